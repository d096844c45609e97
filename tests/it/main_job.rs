//! The main job: several sources, one sink, and what may happen to them meanwhile.

use std::{fs, os::unix::fs::FileExt};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    liar::{Liar, Lie},
    process::{PATIENCE, Process, wait_until},
    slow_link::SlowLink,
    swarm::{MIB, Swarm, free_port},
};

const FILM: &str = "movies/film.mkv";

/// Starts a peer that shares the same film as the others, over a link of this speed; gives its id and the link.
pub fn slow_source(swarm: &mut Swarm, member: &str, bytes_per_second: u64) -> (String, SlowLink) {
    swarm.same("film", &format!("{member}-files/{FILM}"));
    let port = free_port();
    let link = SlowLink::to(port, bytes_per_second);
    let (listen, advertise) = (format!("127.0.0.1:{port}"), link.address.to_string());
    let peer_id = swarm.sharing_peer(member, &["--listen", &listen, "--advertise", &advertise]);
    (peer_id, link)
}

/// Waits until a `get --json` has this share of its bytes, verified.
pub fn wait_progress(get: &mut Process, share: f64) {
    wait_until(&format!("a download is at {share}"), PATIENCE, || {
        assert!(get.is_running(), "{}", get.said());
        let said = get.stdout();
        let events = said
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let done = events
            .filter(|event| event["event"] == "progress")
            .filter_map(|event| {
                Some(event["bytes_done"].as_f64()? / event["bytes_total"].as_f64()?)
            });
        (done.fold(0.0, f64::max) >= share).then_some(())
    });
}

/// Verified bytes from one source, as the summary of `get --json` says.
pub fn bytes_from(summary: &Value, peer_id: &str) -> u64 {
    let sources = summary["sources"].as_array().unwrap();
    let of_peer = sources.iter().find(|source| source["peer"] == peer_id);
    of_peer.map_or(0, |source| source["bytes"].as_u64().unwrap())
}

#[test]
fn three_sources_share_the_work_for_one_sink() {
    let mut swarm = Swarm::start();
    let size = 96 * MIB + 12_345;
    let id = swarm.write("film", size, "film");
    let sources = ["a", "b", "c"].map(|member| slow_source(&mut swarm, member, 32 * MIB));
    swarm.join("sink");
    let row = swarm.wait_listed("sink", FILM, 3);
    assert_eq!(
        (row["size"].as_u64(), row["content_id"].as_str()),
        (Some(size), Some(&*id))
    );

    let get = swarm
        .run("sink", ["get", FILM, "-o", "copy.mkv", "--json"])
        .ok();
    swarm.assert_same("film", "copy.mkv");
    let summary = get.summary();
    assert_eq!(
        (
            summary["bytes_total"].as_u64(),
            summary["bytes_fetched"].as_u64()
        ),
        (Some(size), Some(size))
    );
    let shares = sources
        .each_ref()
        .map(|(peer_id, _)| bytes_from(&summary, peer_id));
    assert_eq!(shares.iter().sum::<u64>(), size, "{summary}");
    assert!(
        shares.iter().all(|bytes| *bytes >= size / 10),
        "equal sources give alike: {shares:?}"
    );
    assert_eq!(
        swarm
            .files_in(".")
            .iter()
            .filter(|name| name.ends_with(".part"))
            .count(),
        0
    );
}

#[test]
fn a_killed_source_and_a_liar_are_survived() {
    let mut swarm = Swarm::start();
    let size = 96 * MIB + 1;
    swarm.write("film", size, "film");
    let sources = ["a", "b", "c"].map(|member| slow_source(&mut swarm, member, 16 * MIB));
    let liar = Liar::start(&swarm, "film", FILM, Lie::Bytes);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, 4);

    let mut get = swarm.spawn("sink", ["get", FILM, "-o", "copy.mkv", "--json"]);
    wait_progress(&mut get, 0.3);
    swarm.kill("c");
    let summary = get.finish(PATIENCE).ok().summary();

    swarm.assert_same("film", "copy.mkv");
    assert!(liar.asked() > 0, "the liar was never asked");
    assert_eq!(bytes_from(&summary, &liar.peer_id), 0, "{summary}");
    assert!(summary["bytes_wasted"].as_u64().unwrap() > 0, "{summary}");
    let shares = sources
        .each_ref()
        .map(|(peer_id, _)| bytes_from(&summary, peer_id));
    assert!(shares.iter().all(|bytes| *bytes > 0), "{shares:?}");
    assert_eq!(shares.iter().sum::<u64>(), size, "{summary}");
}

#[test]
fn liars_alone_are_told_by_the_exit_code() {
    let swarm = Swarm::start();
    swarm.write("film", 4 * MIB, "film");
    swarm.join("sink");
    let _liars = [(Lie::Size, 1), (Lie::Hash, 2), (Lie::Bytes, 3)].map(|(lie, n)| {
        let liar = Liar::start(&swarm, "film", FILM, lie);
        swarm.wait_listed("sink", FILM, n);
        swarm
            .run("sink", ["get", FILM, "-o", "copy.mkv"])
            .fails(6, &["sent wrong bytes", "every source"]);
        assert_eq!(
            liar.asked() > 0,
            lie == Lie::Bytes,
            "bytes are asked for once a manifest is proved"
        );
        assert!(
            swarm
                .files_in(".")
                .iter()
                .all(|name| !name.contains("copy.mkv")),
            "nothing wrong is kept"
        );
        liar
    });
}

#[test]
fn one_honest_source_among_liars_is_enough() {
    let mut swarm = Swarm::start();
    swarm.write("film", 4 * MIB, "film");
    let _liars =
        [Lie::Size, Lie::Hash, Lie::Bytes].map(|lie| Liar::start(&swarm, "film", FILM, lie));
    swarm.same("film", &format!("a-files/{FILM}"));
    let honest = swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, 4);
    let summary = swarm
        .run("sink", ["get", FILM, "-o", "copy.mkv", "--json"])
        .ok()
        .summary();
    swarm.assert_same("film", "copy.mkv");
    assert_eq!(bytes_from(&summary, &honest), 4 * MIB, "{summary}");
}

#[test]
fn a_source_that_comes_later_helps() {
    let mut swarm = Swarm::start();
    let size = 48 * MIB;
    swarm.write("film", size, "film");
    let (_, _slow) = slow_source(&mut swarm, "a", 8 * MIB);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, 1);
    let mut get = swarm.spawn("sink", ["get", FILM, "-o", "copy.mkv", "--json"]);
    wait_progress(&mut get, 0.1);
    swarm.same("film", "b-files/the same under another name");
    let late = swarm.sharing_peer("b", &[]);
    let summary = get.finish(PATIENCE).ok().summary();
    assert!(bytes_from(&summary, &late) > size / 4, "{summary}");
    swarm.assert_same("film", "copy.mkv");
}

#[test]
fn a_file_edited_while_it_is_served_is_never_served_wrong() {
    for has_other in [false, true] {
        let mut swarm = Swarm::start();
        let size = 48 * MIB;
        swarm.write("film", size, "film");
        let (_, _link) = slow_source(&mut swarm, "a", 12 * MIB);
        let edited = swarm.path(&format!("a-files/{FILM}"));
        fs::copy(swarm.path("film"), swarm.path("original")).unwrap();
        swarm.join("sink");
        swarm.wait_listed("sink", FILM, 1);
        let timeout = if has_other { "none" } else { "8s" };
        let flags = ["-o", "copy.mkv", "--json", "--timeout", timeout];
        let mut get = swarm.spawn("sink", [&["get", FILM], &flags[..]].concat());
        wait_progress(&mut get, 0.2);
        let file = fs::File::options().write(true).open(edited).unwrap();
        (0..size / MIB).for_each(|i| file.write_all_at(b"edited in place", i * MIB).unwrap());
        drop(file);
        if has_other {
            fs::create_dir(swarm.path("b-files")).unwrap();
            fs::rename(swarm.path("original"), swarm.path("b-files/original")).unwrap();
            swarm.sharing_peer("b", &[]);
            get.finish(PATIENCE).ok();
            swarm.assert_same("b-files/original", "copy.mkv");
        } else {
            get.finish(PATIENCE).fails(4, &[]);
            assert!(!swarm.path("copy.mkv").exists());
        }
    }
}

#[test]
fn a_last_source_that_dies_ends_the_download_partly_and_its_return_completes_it() {
    let mut swarm = Swarm::start();
    let size = 48 * MIB;
    swarm.write("film", size, "film");
    let (_, link) = slow_source(&mut swarm, "a", 16 * MIB);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, 1);

    let flags = ["-o", "copy.mkv", "--json", "--timeout", "4s"];
    let mut get = swarm.spawn("sink", [&["get", FILM], &flags[..]].concat());
    wait_progress(&mut get, 0.3);
    swarm.kill("a");
    get.finish(PATIENCE).partly(&[(FILM, &["unreachable"])]);
    assert!(!swarm.path("copy.mkv").exists() && swarm.path("copy.mkv.part").exists());

    drop(link);
    swarm.sharing_peer("a", &[]);
    swarm.wait_listed("sink", FILM, 1);
    let summary = swarm
        .run("sink", ["get", FILM, "-o", "copy.mkv", "--json"])
        .ok()
        .summary();
    assert!(
        summary["bytes_resumed"].as_u64().unwrap() >= size / 4,
        "{summary}"
    );
    swarm.assert_same("film", "copy.mkv");
}

#[test]
fn an_interrupted_get_says_so_and_continues() {
    let mut swarm = Swarm::start();
    let size = 48 * MIB + 7;
    swarm.write("film", size, "film");
    let (_, _link) = slow_source(&mut swarm, "a", 8 * MIB);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, 1);

    for (signal, share) in [(Signal::INT, 0.2), (Signal::TERM, 0.5)] {
        let mut get = swarm.spawn("sink", ["get", FILM, "-o", "copy.mkv", "--json"]);
        wait_progress(&mut get, share);
        get.signal(signal);
        get.finish(PATIENCE).fails(7, &["again to continue"]);
        assert!(!swarm.path("copy.mkv").exists());
    }
    let mut get = swarm.spawn("sink", ["get", FILM, "-o", "copy.mkv", "--json"]);
    wait_progress(&mut get, 0.7);
    get.kill();
    let summary = swarm
        .run("sink", ["get", FILM, "-o", "copy.mkv", "--json"])
        .ok()
        .summary();
    let [resumed, fetched] =
        ["bytes_resumed", "bytes_fetched"].map(|name| summary[name].as_u64().unwrap());
    // What the kill cost is what had not been synced since the last clean stop.
    assert!(
        resumed >= size / 2 && resumed + fetched == size,
        "{summary}"
    );
    swarm.assert_same("film", "copy.mkv");
    assert!(!swarm.path("copy.mkv.part").exists());
}
