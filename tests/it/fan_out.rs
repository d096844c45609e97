//! Whoever downloads uploads: receivers of one file bring it to one another while they fetch it.

use std::fs;

use serde_json::Value;

use crate::{
    main_job::{bytes_from, slow_source},
    process::{Outcome, PATIENCE, wait_until},
    swarm::{MIB, Swarm},
};

const FILM: &str = "movies/film.mkv";

/// A seed behind a slow link, and receivers that run as peers; gives their ids.
fn network(receivers: &[&str], bytes_per_second: u64) -> (Swarm, Vec<String>, impl Sized) {
    let mut swarm = Swarm::start();
    swarm.write("film", 24 * MIB, "film");
    let (_, link) = slow_source(&mut swarm, "seed", bytes_per_second);
    let ids = receivers.iter().map(|member| {
        swarm.join(member);
        swarm.start_peer(member, &["--downloads", member_folder(member).as_str()])
    });
    let ids = ids.collect();
    for member in receivers {
        swarm.wait_listed(member, FILM, 1);
    }
    (swarm, ids, link)
}

/// The last event of a `get --json` that went well.
fn summary(outcome: Outcome) -> Value {
    outcome.ok().json().pop().unwrap()
}

fn member_folder(member: &str) -> String {
    format!("{member}-downloads")
}

#[test]
fn three_receivers_share_what_the_seed_sends_once() {
    let members = ["a", "b", "c"];
    let (swarm, ids, _link) = network(&members, 8 * MIB);
    let gets: Vec<_> = members
        .iter()
        .map(|member| swarm.spawn(member, ["get", FILM, "--json"]))
        .collect();
    let done: Vec<Value> = gets
        .into_iter()
        .map(|get| summary(get.finish(PATIENCE)))
        .collect();
    for member in members {
        swarm.assert_same("film", &format!("{}/{FILM}", member_folder(member)));
    }
    for (done, id) in done.iter().zip(&ids) {
        let from_others: u64 = ids
            .iter()
            .filter(|other| *other != id)
            .map(|other| bytes_from(done, other))
            .sum();
        assert!(
            from_others > 4 * MIB,
            "a receiver had too little from the others: {done}"
        );
    }
    let served = swarm.wait_status("seed", "tells what it served", |_| true)["bytes_uploaded"]
        .as_u64()
        .unwrap();
    assert!(
        served < 24 * MIB * 3 / 2,
        "the seed sent {served} bytes of a file of {}",
        24 * MIB
    );
}

/// Leaves in `part` what an earlier download would have left of a file: these bytes, and nothing else.
pub fn leave_part(swarm: &Swarm, file: &str, part: &str, keep: impl Fn(usize) -> bool) {
    let mut bytes = fs::read(swarm.path(file)).unwrap();
    for (i, byte) in bytes.iter_mut().enumerate() {
        if !keep(i) {
            *byte = 0;
        }
    }
    let part = swarm.path(part);
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(part, bytes).unwrap();
}

#[test]
fn two_halves_complete_one_another_without_the_seed() {
    let (mut swarm, ids, _link) = network(&["a", "b"], MIB / 2);
    let half = usize::try_from(12 * MIB).unwrap();
    let part = |member| format!("{}/{FILM}.part", member_folder(member));
    leave_part(&swarm, "film", &part("a"), |i| i < half);
    leave_part(&swarm, "film", &part("b"), |i| i >= half);
    let (mut a, mut b) = (
        swarm.spawn("a", ["get", FILM, "--json"]),
        swarm.spawn("b", ["get", FILM, "--json"]),
    );
    for get in [&mut a, &mut b] {
        wait_until("a download has begun", PATIENCE, || {
            let begun = get
                .stdout()
                .lines()
                .any(|line| line.contains("progress") && !line.contains("\"bytes_done\":0,"));
            (begun || !get.is_running()).then_some(())
        });
    }
    swarm.kill("seed");
    let (a, b) = (summary(a.finish(PATIENCE)), summary(b.finish(PATIENCE)));
    assert!(
        bytes_from(&a, &ids[1]) > 0 && bytes_from(&b, &ids[0]) > 0,
        "{a} {b}"
    );
    swarm.assert_same("film", &format!("a-downloads/{FILM}"));
    swarm.assert_same("film", &format!("b-downloads/{FILM}"));
}

#[test]
fn a_download_is_a_source_while_it_runs() {
    let (swarm, ids, _link) = network(&["a", "b"], 4 * MIB);
    let mut get = swarm.spawn("a", ["get", FILM, "--json"]);
    wait_until("b is told of a's download", PATIENCE, || {
        let rows = swarm.ls("b");
        assert!(
            get.is_running(),
            "it was over before it was listed: {}",
            get.said()
        );
        rows.iter()
            .any(|row| row["name"] == FILM && row["peers"].to_string().contains(&ids[0]))
            .then_some(())
    });
    get.finish(PATIENCE).ok();
}
