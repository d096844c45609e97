//! A tracker that moves, or shows another certificate: members follow it with a new link, and keep who they are.

use std::process::Command;

use crate::{
    process::PATIENCE,
    swarm::{Swarm, TRACKER},
};

/// A network with one peer that shares one file, and a member that runs nothing.
fn network() -> Swarm {
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", 300_000, "film");
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.wait_listed("sink", "film", 1);
    swarm
}

/// Joins with a new link, and says who that made of `member`.
fn join_again(swarm: &Swarm, member: &str) -> String {
    let joined = swarm
        .run(member, ["join", &swarm.link(2), "--json"])
        .ok()
        .json()
        .remove(0);
    assert_eq!(joined["tracker"][0], swarm.address());
    joined["peer_id"].as_str().unwrap().to_owned()
}

#[test]
fn a_new_link_leads_to_the_new_address() {
    let mut swarm = network();
    let before = join_again(&swarm, "sink");
    drop((swarm.take(TRACKER), swarm.take("a")));
    swarm.start_tracker(&["--listen", "127.0.0.1:0"]);
    swarm.run("sink", ["ls"]).fails(10, &["127.0.0.1"]);
    assert_eq!(join_again(&swarm, "sink"), before);
    join_again(&swarm, "a");
    swarm.sharing_peer("a", &[]);
    swarm.wait_ls("sink", PATIENCE, |rows| (rows.len() == 1).then_some(()));
}

#[test]
fn a_new_link_teaches_a_new_certificate() {
    let mut swarm = network();
    let before = join_again(&swarm, "sink");
    let made = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "9",
        ])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(swarm.path(""))
        .output()
        .unwrap();
    assert!(made.status.success());
    drop((swarm.take(TRACKER), swarm.take("a")));
    let address = swarm.address().to_owned();
    swarm.start_tracker(&[
        "--certificate",
        "cert.pem",
        "--certificate-key",
        "key.pem",
        "--listen",
        &address,
    ]);
    swarm.run("sink", ["ls"]).fails(11, &["new link"]);
    assert_eq!(join_again(&swarm, "sink"), before);
    swarm.wait_status("sink", "reaches the tracker", |status| {
        status["tracker_state"] == "reachable"
    });
    // Another network is still another network.
    let other = Swarm::start();
    swarm
        .run("sink", ["join", &other.link(1)])
        .fails(9, &["another network"]);
}
