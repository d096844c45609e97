//! A tracker is only needed to find one another: its end and its return in mid-download change nothing. A listing that
//! is not whole after its return is never taken for the whole.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;
use sprat::{
    peer::member::tracker_client::TrackerClient,
    proto::{RegisterHeader, RegisterRequest, register_request::Part},
};

use crate::{
    main_job::{slow_source, wait_progress},
    process::{PATIENCE, wait_until},
    swarm::{MIB, Swarm, TRACKER},
};

/// Are all files of `before` listed, and does each have as many holders again? The sink may be one more.
fn is_as(before: &[Value], rows: &[Value]) -> bool {
    let same = |(old, new): (&Value, &Value)| {
        let keys = ["name", "content_id"];
        keys.iter().all(|key| old[key] == new[key])
            && new["sources"].as_u64() >= old["sources"].as_u64()
    };
    before.len() == rows.len() && before.iter().zip(rows).all(same)
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
    let before = swarm.ls("sink");

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

    swarm.wait_ls("sink", PATIENCE, |rows| is_as(&before, rows).then_some(()));
    let took = started.elapsed();
    assert!(
        took < HEARTBEAT,
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

/// A network with a lease of so many seconds and members that share so many files of `tree/` each; `sink` only looks.
fn tree(lease: &str, members: &[&str], n_files: usize) -> Swarm {
    let mut swarm = Swarm::with(&[
        ("SPRAT_TRACKER_HEARTBEAT_SECONDS", "2"),
        ("SPRAT_TRACKER_LEASE_SECONDS", lease),
    ]);
    for member in members {
        for n in 0..n_files {
            let file = format!("{member}-files/tree/{member}{n}");
            swarm.write(&file, 1000, &file);
        }
        swarm.sharing_peer(member, &[]);
    }
    swarm.join("sink");
    swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() == members.len() * n_files).then_some(())
    });
    swarm
}

/// Kills the tracker, waits until these members noticed, and starts it again at its address.
fn restart_unseen(swarm: &mut Swarm, members: &[&str]) {
    let address = swarm.address().to_owned();
    swarm.kill(TRACKER);
    for member in members {
        swarm.wait_status(member, "misses the tracker", |status| {
            status["tracker_state"] != "online"
        });
    }
    swarm.start_tracker(&["--listen", &address]);
}

/// How many peers the tracker has noted down.
fn n_noted(swarm: &Swarm) -> usize {
    let noted = fs::read_to_string(swarm.path("tracker/presence")).unwrap();
    noted.lines().count() - 2
}

#[test]
fn a_tree_is_whole_right_after_the_tracker_was_killed() {
    let members = ["a", "b", "c"];
    let mut swarm = tree("20", &members, 5);
    for round in 0..4 {
        // Peers that look for it already, and peers that have not noticed anything.
        let noticing = if round % 2 == 0 { &members[..] } else { &[] };
        restart_unseen(&mut swarm, noticing);
        let restarted = Instant::now();
        let output = format!("out{round}/");
        let get = swarm.spawn("sink", ["get", "tree/", "-o", &output]);
        let ls = swarm.run("sink", ["ls", "tree/", "--json"]).ok();
        assert_eq!(ls.json().len(), 15, "round {round}");
        get.finish(PATIENCE).ok();
        assert_eq!(swarm.files_in(&output).len(), 15, "round {round}");
        let took = restarted.elapsed();
        assert!(
            took < Duration::from_secs(8),
            "peers were back after {took:?}"
        );
    }
}

#[test]
fn who_does_not_come_back_is_missed_for_a_lease() {
    const LEASE: Duration = Duration::from_secs(14);
    let mut swarm = tree("14", &["a", "b", "c"], 2);
    // Who says goodbye is not missed.
    let leaving = swarm.take("b");
    leaving.signal(Signal::TERM);
    leaving.finish(PATIENCE).ok();
    wait_until("the tracker forgets b", PATIENCE, || {
        (n_noted(&swarm) == 2).then_some(())
    });
    swarm.kill("c");
    restart_unseen(&mut swarm, &["a"]);
    let restarted = Instant::now();
    let search = swarm.spawn("sink", ["search", "tree", "--json"]);
    let get = swarm.spawn("sink", ["get", "tree/", "-o", "out/"]);
    let listed = swarm.run("sink", ["ls", "--json"]);
    let rows = listed.json().len();
    listed.fails(13, &["1 peer is not back", "not whole"]);
    assert_eq!(rows, 2, "what is known is shown");
    search.finish(PATIENCE).fails(13, &["not whole"]);
    // A get waits until it is certain.
    get.finish(PATIENCE).ok();
    let took = restarted.elapsed();
    assert!(took < LEASE + Duration::from_secs(4), "{took:?}");
    assert_eq!(swarm.files_in("out"), ["tree/a0", "tree/a1"]);
    swarm.run("sink", ["ls"]).ok();
    assert_eq!(n_noted(&swarm), 1);
}

#[test]
fn a_damaged_note_of_who_was_here_is_set_aside() {
    let mut swarm = tree("4", &["a"], 1);
    let address = swarm.address().to_owned();
    swarm.kill(TRACKER);
    fs::write(swarm.path("tracker/presence"), "sprat presence 1\nend 7\n").unwrap();
    swarm.start_tracker(&["--listen", &address]);
    let said = swarm.running(TRACKER).stderr();
    assert!(said.contains("presence: damaged"), "{said}");
    assert!(swarm.path("tracker/presence.damaged").exists());
    // Nobody knows who was here, so it is waited for a lease.
    let listed = swarm.spawn("sink", ["ls"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let told = runtime.block_on(async {
        let client = TrackerClient::open(&swarm.path("sink"), None).await;
        let mut changes = client.unwrap().watch(&[]).await.unwrap();
        let mut told = vec![];
        while told.last() != Some(&true) {
            let message = changes.message().await.unwrap().unwrap();
            told.extend(message.completeness.map(|told| told.is_whole));
        }
        told
    });
    assert_eq!(told, [false, true], "watchers are told when it is");
    let listed = listed.finish(PATIENCE).ok();
    assert!(listed.stderr.contains("does not know yet"), "{listed:?}");
    assert!(listed.stdout.contains("tree/a0"), "{listed:?}");
}

/// Registers an empty library in the name of a member that does not run.
async fn register(client: &TrackerClient, generation: u64, is_scanning: bool) {
    let header = RegisterHeader {
        generation,
        is_scanning,
        ..Default::default()
    };
    let header = RegisterRequest {
        part: Some(Part::Header(header)),
    };
    let parts = futures_util::stream::iter([header]);
    client.register(parts).await.unwrap();
}

#[test]
fn a_peer_that_looks_through_its_folders_delays_only_what_is_not_listed() {
    let swarm = tree("20", &["a"], 1);
    swarm.join("scanner");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = runtime
        .block_on(TrackerClient::open(&swarm.path("scanner"), None))
        .unwrap();
    runtime.block_on(register(&client, 1, true));
    let listed = swarm.run("sink", ["ls"]).ok();
    assert!(listed.stderr.contains("1 peer is still"), "{listed:?}");
    swarm.run("sink", ["get", "tree/", "-o", "out/"]).ok();
    let began = Instant::now();
    let get = swarm.spawn("sink", ["get", "film"]);
    wait_until("the get waits", PATIENCE, || {
        get.stderr().contains("waiting").then_some(())
    });
    // It could say in 10 s, but then it knows.
    runtime.block_on(register(&client, 2, false));
    get.finish(PATIENCE).fails(3, &["no file `film`"]);
    assert!(began.elapsed() < Duration::from_secs(9));
}
