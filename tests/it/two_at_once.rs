//! Several commands at once on one state directory: one holds it, the others attach.

use crate::{
    main_job::{slow_source, wait_progress},
    process::PATIENCE,
    swarm::{MIB, Swarm},
};

/// A network with two slow films, whose links stay open as long as they are held.
fn network() -> (Swarm, impl Sized) {
    let mut swarm = Swarm::start();
    swarm.write("film", 24 * MIB, "film");
    swarm.write("a-files/second.mkv", 4 * MIB, "second");
    let (_, link) = slow_source(&mut swarm, "a", 12 * MIB);
    swarm.join("sink");
    swarm.wait_listed("sink", "movies/film.mkv", 1);
    swarm.wait_listed("sink", "second.mkv", 1);
    (swarm, link)
}

fn two_gets(swarm: &Swarm) {
    let mut first = swarm.spawn(
        "sink",
        ["get", "movies/film.mkv", "-o", "film.copy", "--json"],
    );
    wait_progress(&mut first, 0.01);
    let second = swarm.spawn("sink", ["get", "second.mkv", "-o", "second.copy", "--json"]);
    let third = swarm.spawn("sink", ["get", "second.mkv", "-o", "third.copy", "--json"]);
    for listing in [["ls", "--json"], ["status", "--json"]] {
        swarm.run("sink", listing).ok();
    }
    for get in [first, second, third] {
        get.finish(PATIENCE).ok();
    }
    swarm.assert_same("film", "film.copy");
    swarm.assert_same("a-files/second.mkv", "second.copy");
    swarm.assert_same("a-files/second.mkv", "third.copy");
}

#[test]
fn gets_share_a_state_directory_without_a_running_peer() {
    let (swarm, _link) = network();
    two_gets(&swarm);
    swarm
        .run("sink", ["status", "--check"])
        .fails(3, &["nothing runs"]);
}

#[test]
fn gets_share_a_running_peer() {
    let (mut swarm, _link) = network();
    swarm.start_peer("sink", &[]);
    two_gets(&swarm);
    let status = swarm.wait_status("sink", "has fetched", |_| true);
    assert!(
        status["bytes_downloaded"].as_u64().unwrap() >= 28 * MIB,
        "{status}"
    );
}

#[test]
fn gets_started_together_settle_who_is_first() {
    let (swarm, _link) = network();
    let gets: Vec<_> = (0..4)
        .map(|i| swarm.spawn("sink", ["get", "second.mkv", "-o", &format!("copy-{i}")]))
        .collect();
    gets.into_iter()
        .for_each(|get| drop(get.finish(PATIENCE).ok()));
    (0..4).for_each(|i| swarm.assert_same("a-files/second.mkv", &format!("copy-{i}")));
}

#[test]
fn one_target_is_written_by_one_get() {
    let (swarm, _link) = network();
    let mut first = swarm.spawn("sink", ["get", "movies/film.mkv", "-o", "copy", "--json"]);
    wait_progress(&mut first, 0.01);
    let second = swarm.run("sink", ["get", "second.mkv", "-o", "copy"]);
    assert!(second.code != Some(0), "{second:#?}");
    first.finish(PATIENCE).ok();
    swarm.assert_same("film", "copy");
}

#[test]
fn a_tree_that_two_members_fetch_into_one_folder_is_whole() {
    let mut swarm = Swarm::start();
    for i in 0..500 {
        swarm.write(&format!("c-files/{}/{i}", i % 7), 100 + i, &format!("{i}"));
    }
    swarm.sharing_peer("c", &[]);
    swarm.join("a");
    swarm.join("b");
    swarm.wait_ls("a", PATIENCE, |rows| (rows.len() == 500).then_some(()));
    let gets = ["a", "b"].map(|member| swarm.spawn(member, ["get", "**", "-o", "copy/"]));
    gets.into_iter()
        .for_each(|get| drop(get.finish(PATIENCE).ok()));
    assert_eq!(swarm.files_in("copy").len(), 500);
    for i in [0, 250, 499] {
        swarm.assert_same(
            &format!("c-files/{}/{i}", i % 7),
            &format!("copy/{}/{i}", i % 7),
        );
    }
}

#[test]
fn a_killed_get_is_taken_over_by_the_next_while_the_peer_still_ends_it() {
    let mut swarm = Swarm::start();
    swarm.write("film", 192 * MIB, "film");
    swarm.same("film", "a-files/film");
    // What is left after the last kill lasts for seconds, so that its progress is told before it is over.
    swarm.sharing_peer("a", &["--upload-limit", "32MiB"]);
    swarm.join("sink");
    swarm.start_peer("sink", &[]);
    swarm.wait_listed("sink", "film", 1);
    let get = |swarm: &Swarm| swarm.spawn("sink", ["get", "film", "-o", "copy", "--json"]);
    // The more was written lately, the longer the end takes: all of it is made durable.
    for share in [0.15, 0.3, 0.5] {
        let mut killed = get(&swarm);
        wait_progress(&mut killed, share);
        killed.kill();
    }
    get(&swarm).finish(PATIENCE).ok();
    swarm.assert_same("film", "copy");
    assert!(!swarm.path("copy.part").exists());
}

#[test]
fn a_second_peer_or_tracker_on_a_state_directory_is_refused() {
    let (mut swarm, _link) = network();
    swarm.start_peer("sink", &[]);
    swarm
        .run("sink", ["peer", "--listen", "127.0.0.1:0"])
        .fails(1, &["already runs"]);
    swarm
        .run("tracker", ["tracker", "run", "--listen", "127.0.0.1:0"])
        .fails(1, &["already runs"]);
}
