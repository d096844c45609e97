//! Services that nobody watches: they wait for what they lack, say why, and go on by themselves.

use std::{fs, os::unix::fs::PermissionsExt};

use crate::{
    process::{PATIENCE, wait_until},
    swarm::{Swarm, TRACKER},
};

const WAITING: [&str; 5] = [
    "peer",
    "--join-token-file",
    "link",
    "--keep-trying",
    "--listen=127.0.0.1:0",
];

#[test]
fn a_peer_waits_for_the_link_that_a_tracker_keeps() {
    let mut swarm = Swarm::empty();
    let peer = swarm.spawn("a", WAITING);
    let lacks = || {
        peer.stderr()
            .contains("cannot start yet: no join link in")
            .then_some(())
    };
    wait_until("the peer says what it lacks", PATIENCE, lacks);
    swarm
        .run("a", ["status", "--check"])
        .fails(3, &["not started yet: no join link in"]);
    fs::write(swarm.path("link"), "sprat://nowhere").unwrap();
    let odd = || peer.stderr().contains("names no HOST:PORT").then_some(());
    wait_until("the peer says what is wrong with the link", PATIENCE, odd);

    swarm.start_tracker(&[
        "--listen=127.0.0.1:0",
        "--keep-token-file=link",
        "--keep-operator-certificate=operator",
    ]);
    let healthy = || (swarm.run("a", ["status", "--check"]).code == Some(0)).then_some(());
    wait_until("the peer is a member and online", PATIENCE, healthy);
    assert_eq!(
        peer.stderr()
            .matches("cannot start yet: no join link")
            .count(),
        1,
        "{}",
        peer.said()
    );
    swarm.run(TRACKER, ["status", "--check"]).ok();

    let mode = |name: &str| {
        fs::symlink_metadata(swarm.path(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!(
        (mode("link"), mode("operator/operator.key")),
        (0o600, 0o600)
    );
    // Who is a member needs no link any more.
    drop(peer);
    fs::remove_file(swarm.path("link")).unwrap();
    let _again = swarm.spawn("a", WAITING);
    wait_until("the peer is online again", PATIENCE, healthy);
}

#[test]
fn a_tracker_waits_for_its_port_only_if_told_to() {
    let mut swarm = Swarm::start();
    swarm
        .run("a", ["peer", "--join-token-file", "link"])
        .fails(1, &["no join link in"]);
    swarm
        .run("b", ["tracker", "run", "--listen", swarm.address()])
        .fails(1, &["the port is in use"]);
    assert!(!swarm.path("b/waiting").exists());
    let second = swarm.spawn(
        "b",
        [
            "tracker",
            "run",
            "--keep-trying",
            "--listen",
            swarm.address(),
        ],
    );
    let taken = || {
        swarm
            .run("b", ["status", "--check"])
            .stderr
            .contains("the port is in use")
            .then_some(())
    };
    wait_until("the second tracker says why it waits", PATIENCE, taken);
    swarm.kill(TRACKER);
    let healthy = || (swarm.run("b", ["status", "--check"]).code == Some(0)).then_some(());
    wait_until("the second tracker took the port", PATIENCE, healthy);
    assert!(!swarm.path("b/waiting").exists(), "{}", second.said());
}
