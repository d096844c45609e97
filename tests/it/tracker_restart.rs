//! A tracker is only needed to find one another: its end and its return in mid-download change nothing.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    main_job::{slow_source, wait_progress},
    process::PATIENCE,
    swarm::{MIB, Swarm},
};

/// Names, contents and how many hold them; the order of the holders means nothing.
fn known(rows: &[Value]) -> Vec<[String; 3]> {
    rows.iter()
        .map(|row| ["name", "content_id", "sources"].map(|key| row[key].to_string()))
        .collect()
}

#[test]
fn a_tracker_restarted_in_mid_download_is_not_noticed() {
    const HEARTBEAT: Duration = Duration::from_secs(4);
    let mut swarm = Swarm::with(&[
        ("SPRAT_TRACKER_HEARTBEAT_SECONDS", "4"),
        ("SPRAT_TRACKER_LEASE_SECONDS", "12"),
    ]);
    swarm.write("film", 64 * MIB, "film");
    let _links = ["a", "b"].map(|member| slow_source(&mut swarm, member, 8 * MIB));
    swarm.write("c-files/other", 1000, "other");
    swarm.sharing_peer("c", &[]);
    swarm.join("sink");
    swarm.wait_listed("sink", "movies/film.mkv", 2);
    swarm.wait_listed("sink", "other", 1);
    let before = known(&swarm.ls("sink"));

    let mut get = swarm.spawn(
        "sink",
        ["get", "movies/film.mkv", "-o", "copy.mkv", "--json"],
    );
    wait_progress(&mut get, 0.15);
    let address = swarm.address().to_owned();
    swarm.kill("tracker");
    wait_progress(&mut get, 0.35);
    let started = Instant::now();
    swarm.start_tracker(&["--listen", &address]);
    assert_eq!(swarm.address(), address);

    swarm.wait_ls("sink", PATIENCE, |rows| {
        (known(rows) == before).then_some(())
    });
    let took = started.elapsed();
    assert!(
        took < HEARTBEAT.mul_f64(1.1) + Duration::from_secs(1),
        "the listing was complete only after {took:?}"
    );
    let got = get.finish(PATIENCE).ok();
    assert_eq!(got.summary()["bytes_total"], 64 * MIB);
    swarm.assert_same("film", "copy.mkv");
    for member in ["a", "b", "c"] {
        assert!(swarm.running(member).is_running());
        swarm.wait_status(member, "is online", |status| {
            status["tracker_state"] == "online"
        });
    }
}

#[test]
fn members_and_tokens_outlive_the_tracker() {
    let mut swarm = Swarm::start();
    let address = swarm.address().to_owned();
    let link = swarm.link(2);
    swarm.run("a", ["join", &link]).ok();
    let tracker = swarm.take("tracker");
    tracker.signal(Signal::TERM);
    tracker.finish(PATIENCE).ok();

    let offline = swarm.link(1);
    swarm.start_tracker(&["--listen", &address]);
    swarm.run("a", ["ls"]).ok();
    swarm.run("b", ["join", &link]).ok();
    swarm.run("c", ["join", &link]).fails(11, &["token"]);
    swarm.run("c", ["join", &offline]).ok();
    let members = swarm
        .run("tracker", ["tracker", "members", "--json"])
        .ok()
        .json();
    assert_eq!(members.len(), 3);
}
