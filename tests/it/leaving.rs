//! How services end: politely, at once, and without trace.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::{
    process::{PATIENCE, wait_until},
    swarm::Swarm,
};

#[test]
fn sigterm_ends_peer_and_tracker_politely() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", 100_000, "film");
    swarm.sharing_peer("a", &[]);
    swarm.join("b");
    swarm.wait_listed("b", "film", 1);

    let peer = swarm.take("a");
    let asked = Instant::now();
    peer.signal(Signal::TERM);
    peer.finish(PATIENCE).ok();
    // The lease would have lasted half a minute.
    assert_eq!(swarm.ls("b").len(), 0);
    assert!(asked.elapsed() < Duration::from_secs(15));

    let tracker = swarm.take("tracker");
    tracker.signal(Signal::INT);
    tracker.finish(PATIENCE).ok();
    swarm.run("b", ["ls"]).fails(10, &[swarm.address()]);
}

#[test]
fn a_peer_that_vanishes_is_forgotten_with_its_lease() {
    let mut swarm = Swarm::with(&[
        ("SPRAT_TRACKER_HEARTBEAT_SECONDS", "1"),
        ("SPRAT_TRACKER_LEASE_SECONDS", "3"),
    ]);
    swarm.write("a-files/film", 2_000_000, "film");
    swarm.sharing_peer("a", &[]);
    swarm.join("b");
    swarm.wait_listed("b", "film", 1);
    swarm.kill("a");
    // Until then it is listed, and nobody answers.
    swarm
        .run("b", ["get", "film", "-o", "copy", "--timeout", "4s"])
        .fails(4, &["no source"]);
    assert!(!swarm.path("copy").exists());
    swarm.wait_ls("b", Duration::from_secs(10), |rows| {
        rows.is_empty().then_some(())
    });
}

#[test]
fn killed_services_leave_nothing_in_the_way() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", 100_000, "film");
    let id = swarm.sharing_peer("a", &[]);
    let address = swarm.address().to_owned();
    swarm.kill("a");
    swarm.kill("tracker");
    assert!(
        swarm.path("a/control.sock").exists(),
        "a dead owner's socket stays behind"
    );
    swarm.start_tracker(&["--listen", &address]);
    assert_eq!(swarm.sharing_peer("a", &[]), id);
    swarm.wait_listed("a", "film", 1);
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", 100_000, "film");
    swarm.sharing_peer("a", &[]);
    let mut peer = swarm.take("a");
    peer.signal(Signal::TERM);
    wait_until("the peer ends", Duration::from_secs(15), || {
        if peer.is_running() {
            peer.signal(Signal::TERM);
        }
        (!peer.is_running()).then_some(())
    });
}
