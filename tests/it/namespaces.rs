//! The main job once more between machines: network namespaces with addresses of their own, everybody listening on
//! `[::]`, nobody told what its address is.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    main_job::{bytes_from, wait_progress},
    process::{PATIENCE, wait_until},
    swarm::{MIB, Swarm, skip},
};

/// Namespaces `NAME-1`… on one bridge, which lies in a namespace of its own; all gone when dropped.
struct Machines {
    name: String,
    n: usize,
}

/// What the command `ip` prints; none if it fails.
pub fn told_by_ip(words: &str) -> Option<String> {
    let output = Command::new("ip").args(words.split(' ')).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn ip(words: &str) -> bool {
    told_by_ip(words).is_some()
}

impl Machines {
    /// None if this machine does not let us.
    fn new(what: &str, n: usize) -> Option<Self> {
        let machines = Self {
            name: format!("sprat{}{what}", std::process::id()),
            n,
        };
        let (name, bridge) = (&machines.name, machines.of(0));
        let mut made = ip(&format!("netns add {bridge}"))
            && ip(&format!("-n {bridge} link add bridge type bridge"))
            && ip(&format!("-n {bridge} link set bridge up"));
        for i in 1..=n {
            let machine = machines.of(i);
            made = made
                && ip(&format!("netns add {name}-{i}"))
                && ip(&format!(
                    "-n {machine} link add eth0 type veth peer name port{i} netns {bridge}"
                ))
                && ip(&format!("-n {bridge} link set port{i} master bridge up"))
                && ip(&format!("-n {machine} addr add 10.77.0.{i}/24 dev eth0"))
                && ip(&format!(
                    "-n {machine} addr add fd77::{i}/64 dev eth0 nodad"
                ))
                && ip(&format!("-n {machine} link set lo up"))
                && ip(&format!("-n {machine} link set eth0 up"))
                && ip(&format!("-n {machine} route add default via 10.77.0.254"));
        }
        made.then_some(machines)
    }

    fn of(&self, i: usize) -> String {
        format!("{}-{i}", self.name)
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for i in 0..=self.n {
            ip(&format!("netns del {}", self.of(i)));
        }
    }
}

#[test]
fn machines_with_different_addresses_swarm() {
    let members = ["tracker", "a", "b", "c", "sink"];
    let Some(machines) = Machines::new("swarm", members.len()) else {
        return skip("the swarm over network namespaces: needs root and the command ip");
    };
    let mut swarm = Swarm::empty();
    for (i, member) in (1..).zip(members) {
        swarm.wrap(member, &["ip", "netns", "exec", &machines.of(i)]);
    }
    swarm.start_tracker(&[]);
    assert_eq!(
        swarm.address(),
        "10.77.0.1:7700",
        "the address of the interface that leads out"
    );

    let size = 64 * MIB + 5;
    swarm.write("film", size, "film");
    swarm.write("sequel", size, "sequel");
    let mut ids = Vec::new();
    for member in ["a", "b", "c"] {
        ["film", "sequel"]
            .iter()
            .for_each(|film| swarm.same(film, &format!("{member}-files/{film}")));
        ids.push(swarm.sharing_peer(member, &["--listen", "[::]:7701"]));
    }
    swarm.join("sink");
    ["film", "sequel"]
        .iter()
        .for_each(|film| _ = swarm.wait_listed("sink", film, 3));
    let peers = swarm.run("sink", ["ls", "--peers", "--json"]).ok().json();
    for peer in &peers {
        let addresses = peer["addresses"].to_string();
        assert!(
            addresses.contains("10.77.0.") && addresses.contains("fd77::"),
            "{peer}"
        );
        assert!(
            !addresses.contains("127.0.0.1") && !addresses.contains("[::1]"),
            "loopback is nobody else's: {peer}"
        );
    }
    let shares = |summary: &serde_json::Value| {
        ids.iter()
            .map(|id| bytes_from(summary, id))
            .collect::<Vec<_>>()
    };
    let summary = swarm
        .run("sink", ["get", "film", "-o", "copy", "--json"])
        .ok()
        .summary();
    swarm.assert_same("film", "copy");
    assert!(shares(&summary).iter().all(|bytes| *bytes > 0), "{summary}");

    // A cable is pulled in mid-download.
    for i in 2..=4 {
        assert!(ip(&format!("-n {} link set port{i} up", machines.of(0))));
        let shaped = format!(
            "netns exec {} tc qdisc add dev eth0 root tbf rate 160mbit burst 256k latency 100ms",
            machines.of(i)
        );
        if !ip(&shaped) {
            return skip("pulling a cable in mid-download: needs the command tc");
        }
    }
    let mut get = swarm.spawn("sink", ["get", "sequel", "-o", "second", "--json"]);
    wait_progress(&mut get, 0.2);
    assert!(ip(&format!("-n {} link set port4 down", machines.of(0))));
    let summary = get.finish(PATIENCE).ok().summary();
    swarm.assert_same("sequel", "second");
    assert_eq!(shares(&summary).iter().sum::<u64>(), size, "{summary}");
}

#[test]
fn a_machine_whose_address_changes_is_listed_with_the_new_one() {
    let Some(machines) = Machines::new("moves", 2) else {
        return skip("a machine that moves: needs root and the command ip");
    };
    let mut swarm = Swarm::empty();
    for (i, member) in [(1, "tracker"), (1, "sink"), (2, "a")] {
        swarm.wrap(member, &["ip", "netns", "exec", &machines.of(i)]);
    }
    swarm.start_tracker(&[]);
    swarm.write("a-files/film", 1000, "film");
    swarm.sharing_peer("a", &["--listen", "[::]:7701"]);
    swarm.join("sink");
    swarm.wait_listed("sink", "film", 1);

    let machine = machines.of(2);
    assert!(ip(&format!("-n {machine} addr del 10.77.0.2/24 dev eth0")));
    assert!(ip(&format!("-n {machine} addr add 10.77.0.42/24 dev eth0")));
    let moved = Instant::now();
    // Sooner than a heartbeat, which would not get through on the old line either.
    wait_until("the new address is listed", PATIENCE, || {
        let peers = swarm.run("sink", ["ls", "--peers", "--json"]).ok().json();
        let addresses = peers.first()?["addresses"].to_string();
        let is_new = addresses.contains("10.77.0.42:") && !addresses.contains("10.77.0.2:");
        is_new.then_some(())
    });
    let took = moved.elapsed();
    assert!(took < Duration::from_secs(9), "{took:?}");
    swarm.run("sink", ["get", "film", "-o", "copy"]).ok();
}
