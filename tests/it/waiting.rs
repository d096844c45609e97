//! A get waits for sources: it says since when, goes on when one comes back, and gives up after its timeout.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    full_disk::{SmallDisk, fill, wait_note},
    liar::{Liar, Lie},
    main_job::{bytes_from, slow_source, wait_progress},
    process::{PATIENCE, Process, wait_until},
    swarm::{MIB, Swarm, skip},
};

const FILM: &str = "movies/film.mkv";
const SIZE: u64 = 24 * MIB + 9;

/// A source `a` of the film at this speed, and `sink`; gives the id of `a`.
fn network(bytes_per_second: u64) -> (Swarm, String, impl Sized) {
    let mut swarm = Swarm::start();
    swarm.write("film", SIZE, "film");
    let (source, link) = slow_source(&mut swarm, "a", bytes_per_second);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, 1);
    (swarm, source, link)
}

fn get(swarm: &Swarm, flags: &[&str]) -> Process {
    swarm.spawn("sink", [&["get", FILM, "-o", "copy"], flags].concat())
}

#[test]
fn a_source_that_is_restarted_is_waited_for() {
    for timeout in [&[][..], &["--timeout", "none"]] {
        let (mut swarm, source, _link) = network(8 * MIB);
        let mut get = get(&swarm, &[&["--json"], timeout].concat());
        wait_progress(&mut get, 0.2);
        swarm.kill("a");
        wait_note(
            &mut get,
            &format!("waiting for a source of {FILM}, last one here "),
        );
        assert_eq!(swarm.sharing_peer("a", &[]), source);
        let got = get.finish(PATIENCE).ok();
        swarm.assert_same("film", "copy");
        let summary = got.summary();
        // What was on its way when it was killed comes again.
        assert!(bytes_from(&summary, &source) >= SIZE, "{summary}");
        assert!(
            summary["bytes_wasted"].as_u64().unwrap() < 4 * MIB,
            "{summary}"
        );
    }
}

#[test]
fn people_are_told_who_is_waited_for() {
    let (mut swarm, _, _link) = network(8 * MIB);
    swarm.kill("a");
    let mut get = get(&swarm, &[]);
    let wanted = format!("waiting for a source of {FILM}, none was here yet");
    wait_until("the get says what it waits for", PATIENCE, || {
        assert!(get.is_running(), "{}", get.said());
        get.stderr().contains(&wanted).then_some(())
    });
    swarm.sharing_peer("a", &[]);
    get.finish(PATIENCE).ok();
    swarm.assert_same("film", "copy");
}

#[test]
fn a_get_that_nothing_came_of_ends_with_its_timeout() {
    let (mut swarm, _, _link) = network(MIB);
    swarm.kill("a");
    for (timeout, least) in [("1s", 1), ("4s", 4)] {
        let began = Instant::now();
        let got = get(&swarm, &["--timeout", timeout]).finish(PATIENCE);
        got.fails(4, &[FILM]);
        let took = began.elapsed();
        assert!(
            took >= Duration::from_secs(least) && took < Duration::from_secs(least + 10),
            "{timeout} took {took:?}"
        );
        assert!(!swarm.path("copy").exists());
    }
}

#[test]
fn bytes_that_trickle_in_are_no_use() {
    let swarm = Swarm::start();
    swarm.write("film", MIB, "film");
    let _liar = Liar::start(&swarm, "film", FILM, Lie::Trickle);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, 1);
    let began = Instant::now();
    get(&swarm, &["--timeout", "4s"])
        .finish(PATIENCE)
        .fails(4, &[FILM]);
    assert!(
        began.elapsed() < Duration::from_secs(25),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_timeout_is_a_duration_or_none() {
    let (swarm, _, _link) = network(MIB);
    for wrong in ["soon", "4 parsecs", "0s", ""] {
        get(&swarm, &["--timeout", wrong])
            .finish(PATIENCE)
            .fails(2, &["--timeout"]);
    }
}

#[test]
fn a_get_that_is_interrupted_while_it_waits_can_be_continued() {
    for signal in [Signal::INT, Signal::TERM] {
        let (mut swarm, _, _link) = network(8 * MIB);
        let mut waits = get(&swarm, &["--json"]);
        wait_progress(&mut waits, 0.2);
        swarm.kill("a");
        wait_note(&mut waits, "waiting for a source of");
        waits.signal(signal);
        waits.finish(PATIENCE).fails(7, &["again to continue"]);
        assert!(swarm.path("copy.part").exists());
    }
}

/// The only source is killed while the disk is full, which then has room again.
fn killed_while_full(small: u64) {
    let mut swarm = Swarm::start();
    let Some(disk) = SmallDisk::in_memory(&mut swarm, "sink", "downloads") else {
        return skip("a source that ends while the disk is full: this user may not mount one");
    };
    let n = 16 * MIB / small;
    for i in 0..n {
        swarm.write(&format!("a-files/tree/{i}"), small, &format!("{i}"));
    }
    swarm.sharing_peer("a", &["--upload-limit", "4MiB"]);
    swarm.join("sink");
    swarm.start_peer("sink", &["--downloads", "downloads"]);
    swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() as u64 == n).then_some(())
    });
    let mut get = swarm.spawn("sink", ["get", "tree/", "--json", "--timeout", "4s"]);
    wait_progress(&mut get, 0.1);
    let filler = swarm.path(&format!("{}/filler", disk.folder));
    fill(&filler);
    wait_note(&mut get, "the disk is full; waiting for room");
    swarm.kill("a");
    fs::remove_file(filler).unwrap();
    let got = get.finish(PATIENCE);
    assert_eq!(got.code, Some(12), "{got:#?}");
    let (failed, here) = (got.failed_files(), swarm.files_in(&disk.folder));
    let here: Vec<_> = here.iter().filter(|name| !name.contains(".part")).collect();
    assert_eq!(
        failed.len() + here.len(),
        usize::try_from(n).unwrap(),
        "{got:#?}"
    );
    assert!(
        failed.values().all(|reason| reason == "unreachable"),
        "{failed:?}"
    );
}

#[test]
fn a_source_that_ends_while_the_disk_is_full_ends_a_get_of_small_files() {
    killed_while_full(256 << 10);
}

#[test]
fn a_source_that_ends_while_the_disk_is_full_ends_a_get_of_long_files() {
    killed_while_full(4 * MIB);
}
