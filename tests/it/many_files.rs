//! Many small files: to a reader that is slow, from a source that dies, with few descriptors.

use std::time::{Duration, Instant};

use crate::{
    process::{PATIENCE, wait_until},
    swarm::Swarm,
};

/// So many files at each of these members, and `sink`, which sees all of them.
fn network(n: u64, members: &[&str], flags: &[&str], few: &[&str]) -> Swarm {
    let mut swarm = Swarm::start();
    for member in few {
        limit_descriptors(&mut swarm, member);
    }
    let name = |i: u64| format!("{:02}/{i}", i % 30);
    for i in 0..n {
        swarm.write(
            &format!("files/{}", name(i)),
            1_000 + i % 4_000,
            &format!("{i}"),
        );
    }
    for member in members {
        for i in 0..n {
            let name = name(i);
            swarm.same(&format!("files/{name}"), &format!("{member}-files/{name}"));
        }
        swarm.sharing_peer(member, flags);
    }
    swarm.join("sink");
    swarm.wait_ls("sink", PATIENCE, |rows| {
        let has_all = rows.iter().all(|row| row["sources"] == members.len());
        (has_all && rows.len() as u64 == n).then_some(())
    });
    swarm
}

/// A member's commands have no more than 256 descriptors.
fn limit_descriptors(swarm: &mut Swarm, member: &str) {
    swarm.wrap(member, &["sh", "-c", "ulimit -n 256; exec \"$@\"", "sh"]);
}

#[track_caller]
fn assert_all_here(swarm: &Swarm) {
    let names = swarm.files_in("files");
    assert_eq!(swarm.files_in("copy"), names);
    for name in names.iter().step_by(97) {
        swarm.assert_same(&format!("files/{name}"), &format!("copy/{name}"));
    }
}

/// Waits until nothing has come for a while.
fn wait_quiet(swarm: &Swarm) {
    let mut last = (0, Instant::now());
    wait_until("nothing comes any more", PATIENCE, || {
        let n = swarm.files_in("copy").len();
        if n != last.0 {
            last = (n, Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(1)).then_some(())
    });
}

#[test]
fn a_slow_reader_and_a_source_that_dies_lose_no_file() {
    const FILES: u64 = 3_000;
    let mut swarm = network(FILES, &["a", "b"], &["--upload-limit", "2MiB"], &[]);
    let mut get = swarm.spawn_unread("sink", ["get", "**", "-o", "copy/", "--json"]);
    wait_until("some files are here", PATIENCE, || {
        assert!(get.is_running(), "{}", get.said());
        (swarm.files_in("copy").len() > 200).then_some(())
    });
    swarm.kill("b");
    wait_quiet(&swarm);
    get.read_on();
    let got = get.finish(PATIENCE).ok();
    assert_eq!(got.summary()["files"], FILES, "{}", got.summary());
    let named = got.json();
    let named = named.iter().filter(|event| event["event"] == "file");
    assert_eq!(named.count() as u64, FILES);
    assert_all_here(&swarm);
}

#[test]
fn few_descriptors_are_enough() {
    const FILES: u64 = 2_000;
    // A get on its own, and one of a running peer.
    for has_peer in [false, true] {
        let mut swarm = network(FILES, &["a"], &[], &["a", "sink"]);
        if has_peer {
            swarm.start_peer("sink", &[]);
        }
        let got = swarm
            .run("sink", ["get", "**", "-o", "copy/", "--json"])
            .ok();
        assert_eq!(got.summary()["files"], FILES, "{}", got.summary());
        assert_all_here(&swarm);
    }
}
