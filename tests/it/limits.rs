//! Limits on what is sent and fetched: they hold, for everybody together, and can be changed in the middle.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    main_job::{slow_source, wait_progress},
    process::PATIENCE,
    swarm::{MIB, Swarm},
};

const FILM: &str = "movies/film.mkv";
/// More than may go beside the rate: a tenth of a second's, a piece, a chunk for each stream.
const BURST: u64 = MIB;

/// A network where `a` shares a film of this size.
fn network(size: u64, flags: &[&str]) -> Swarm {
    let mut swarm = Swarm::start();
    swarm.write("film", size, "film");
    swarm.same("film", &format!("a-files/{FILM}"));
    swarm.sharing_peer("a", flags);
    for sink in ["b", "c"] {
        swarm.join(sink);
        swarm.wait_listed(sink, FILM, 1);
    }
    swarm
}

/// Demands that so many bytes took their time.
#[track_caller]
fn assert_held_back(bytes: u64, rate: u64, began: Instant) {
    let least = Duration::from_secs_f64((bytes - BURST) as f64 / rate as f64);
    assert!(
        began.elapsed() >= least,
        "{bytes} bytes in {:?}, at most {rate} a second",
        began.elapsed()
    );
}

fn limits(swarm: &Swarm, flags: &[&str]) -> Value {
    swarm
        .run("a", [&["limit", "--json"], flags].concat())
        .ok()
        .json()
        .remove(0)
}

#[test]
fn two_receivers_get_a_limited_source_to_send_no_faster() {
    let swarm = network(8 * MIB, &["--upload-limit", "4MiB"]);
    let began = Instant::now();
    let gets =
        ["b", "c"].map(|sink| swarm.spawn(sink, ["get", FILM, "-o", &format!("{sink}.mkv")]));
    gets.into_iter()
        .for_each(|get| drop(get.finish(PATIENCE).ok()));
    let sent = swarm.wait_status("a", "has sent", |_| true)["bytes_uploaded"]
        .as_u64()
        .unwrap();
    assert!(sent >= 8 * MIB, "{sent}");
    assert_held_back(sent, 4 * MIB, began);
    ["b.mkv", "c.mkv"]
        .iter()
        .for_each(|copy| swarm.assert_same("film", copy));
}

#[test]
fn a_limit_for_each_peer_holds_for_each_and_is_named() {
    let swarm = network(
        3 * MIB,
        &["--upload-limit-per-peer", "1MiB", "--upload-limit", "1GiB"],
    );
    let began = Instant::now();
    let summary = swarm
        .run("b", ["get", FILM, "-o", "b.mkv", "--json"])
        .ok()
        .summary();
    assert_held_back(3 * MIB, MIB, began);
    assert_eq!(summary["bottleneck"], "source_limit", "{summary}");
    swarm.assert_same("film", "b.mkv");
}

#[test]
fn a_get_obeys_the_download_limit_of_the_settings_and_names_it() {
    let mut swarm = network(3 * MIB, &[]);
    swarm.set("SPRAT_PEER_DOWNLOAD_LIMIT", "1MiB");
    let began = Instant::now();
    let summary = swarm
        .run("b", ["get", FILM, "-o", "b.mkv", "--json"])
        .ok()
        .summary();
    assert_held_back(3 * MIB, MIB, began);
    assert_eq!(summary["bottleneck"], "limit", "{summary}");
    swarm.assert_same("film", "b.mkv");
}

#[test]
fn a_slow_link_is_named() {
    let mut swarm = Swarm::start();
    swarm.write("film", 2 * MIB, "film");
    let _source = slow_source(&mut swarm, "a", MIB);
    swarm.join("b");
    swarm.wait_listed("b", FILM, 1);
    let summary = swarm
        .run("b", ["get", FILM, "-o", "b.mkv", "--json"])
        .ok()
        .summary();
    assert_eq!(summary["bottleneck"], "network", "{summary}");
}

#[test]
fn a_limit_is_changed_in_the_middle() {
    // At this rate the film would take longer than anybody here waits.
    let swarm = network(32 * MIB, &["--upload-limit", "256KiB"]);
    assert_eq!(limits(&swarm, &[])["upload"], 256 << 10);
    let mut get = swarm.spawn("b", ["get", FILM, "-o", "b.mkv", "--json"]);
    wait_progress(&mut get, 0.001);

    let told = limits(
        &swarm,
        &["--upload", "512KiB", "--download-per-peer", "1GiB/s"],
    );
    let expected = json!({ "upload": 512 << 10, "download": null, "upload_per_peer": null, "download_per_peer": 1 << 30 });
    assert_eq!(told, expected);
    let status = swarm.wait_status("a", "answers", |_| true);
    assert_eq!(status["limits"], expected);
    let shown = swarm.run("a", ["status"]).ok().stdout;
    assert!(
        shown.contains("limits       upload 512.0 KiB/s, download per peer 1.0 GiB/s"),
        "{shown}"
    );
    assert!(get.is_running());

    let shown = swarm
        .run(
            "a",
            ["limit", "--upload", "none", "--download-per-peer", "none"],
        )
        .ok()
        .stdout;
    assert!(shown.starts_with("upload             none\n"), "{shown}");
    assert!(!swarm.run("a", ["status"]).ok().stdout.contains("limits"));
    get.finish(PATIENCE).ok();
    swarm.assert_same("film", "b.mkv");
}

#[test]
fn limits_that_are_none_are_refused() {
    let mut swarm = Swarm::start();
    swarm.join("a");
    swarm
        .run("a", ["limit"])
        .fails(3, &["no peer runs", "peer.upload_limit"]);
    for wrong in ["0", "fast", "10", "20Mbit"] {
        let words = ["is not a limit; write none, or 500k, 20MB or 1GiB"];
        swarm
            .run("a", ["peer", "--upload-limit", wrong])
            .fails(2, &[&words[..], &["`peer.upload_limit`"]].concat());
        swarm
            .run("a", ["limit", "--download", wrong])
            .fails(2, &words);
        let mut get = swarm.command("a", ["get", "film"]);
        get.env("SPRAT_PEER_DOWNLOAD_LIMIT", wrong);
        swarm
            .spawn_command(&mut get, None)
            .finish(PATIENCE)
            .fails(2, &words);
    }
    swarm.start_peer("a", &["--download-limit", "none"]);
    assert_eq!(limits(&swarm, &[])["download"], Value::Null);
}
