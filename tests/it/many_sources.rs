//! Many sources, most of which are of no use: dead, deaf, slow or lying. The few that are good are found, and soon.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{
    fan_out::leave_part,
    liar::{Liar, Lie, Truth},
    main_job::bytes_from,
    process::{PATIENCE, Process, wait_until},
    swarm::{MIB, Swarm},
};

const FILM: &str = "movies/film.mkv";

/// A film, and so many liars that register it, each with one of these lies in turn.
fn network(size: u64, n: usize, lies: &[Lie]) -> (Swarm, Vec<Liar>) {
    let swarm = Swarm::start();
    swarm.write("film", size, "film");
    let truth = Truth::of(&swarm, "film");
    let offers = lies.iter().cycle().take(n);
    let offers = offers.map(|lie| vec![truth.offer(FILM, &[*lie])]).collect();
    let liars = Liar::all(&swarm, offers);
    (swarm, liars)
}

fn get(swarm: &Swarm) -> Process {
    swarm.spawn(
        "sink",
        ["get", FILM, "-o", "copy", "--json", "--timeout", "40s"],
    )
}

/// Starts the honest source `a`, and waits until `sink` sees it beside so many others; gives its id.
fn add_honest(swarm: &mut Swarm, n_others: usize) -> String {
    swarm.same("film", &format!("a-files/{FILM}"));
    let honest = swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, n_others + 1);
    honest
}

/// The film arrives within this time, and all of it from these.
#[track_caller]
fn assert_fetched(swarm: &Swarm, within: Duration, honest: &[&str]) {
    let began = Instant::now();
    let got = get(swarm).finish(PATIENCE).ok();
    assert!(began.elapsed() < within, "{:?}: {got:#?}", began.elapsed());
    swarm.assert_same("film", "copy");
    let summary = got.summary();
    let bytes = honest.iter().map(|peer| bytes_from(&summary, peer));
    assert_eq!(
        Some(bytes.sum()),
        summary["bytes_fetched"].as_u64(),
        "{summary}"
    );
}

#[test]
fn one_source_alive_among_forty_dead_ones_is_found() {
    // With the highest of several ids it comes late in any order of them.
    let (mut swarm, liars) = network(MIB, 40, &[Lie::Closed, Lie::SilentTcp, Lie::Deaf]);
    let ids = (0..6).map(|i| (swarm.join(&format!("a{i}")), i)).max();
    let (honest, i) = ids.unwrap();
    let member = format!("a{i}");
    swarm.same("film", &format!("{member}-files/{FILM}"));
    assert_eq!(swarm.sharing_peer(&member, &[]), honest);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, liars.len() + 1);
    assert_fetched(&swarm, Duration::from_secs(30), &[&honest]);
}

#[test]
fn holders_that_nothing_reaches_do_not_delay_the_first_byte() {
    for lies in [&[Lie::Deaf][..], &[Lie::SilentTcp, Lie::SilentTls]] {
        let (mut swarm, liars) = network(MIB, 5, lies);
        let honest = add_honest(&mut swarm, liars.len());
        assert_fetched(&swarm, Duration::from_secs(4), &[&honest]);
    }
}

/// Liars of each kind that keep a manifest back, so many at a time, delay the film by so much at most.
fn manifests_are_not_waited_for(n: usize, most: Duration) {
    for lie in [Lie::ManifestTrickle, Lie::ManifestNever, Lie::ManifestFlood] {
        let (mut swarm, liars) = network(MIB, n, &[lie]);
        add_honest(&mut swarm, liars.len());
        let began = Instant::now();
        get(&swarm).finish(PATIENCE).ok();
        let took = began.elapsed();
        assert!(took < most, "{lie:?}: {took:?}");
        swarm.assert_same("film", "copy");
    }
}

#[test]
fn manifests_that_trickle_or_never_come_do_not_delay_another() {
    manifests_are_not_waited_for(3, Duration::from_secs(10));
}

#[test]
fn any_number_of_manifests_that_never_come_keeps_none_back() {
    manifests_are_not_waited_for(12, Duration::from_secs(40));
}

#[test]
fn four_honest_sources_among_sixty_liars_are_enough() {
    const LIARS: usize = 60;
    let lies = [
        Lie::Bytes,
        Lie::Hash,
        Lie::Size,
        Lie::Have,
        Lie::Denial,
        Lie::Unknown,
        Lie::OutOfRange,
        Lie::Promised,
        Lie::Trickle,
        Lie::Silence,
        Lie::SilentTls,
        Lie::SilentTcp,
        Lie::Closed,
        Lie::Deaf,
        Lie::Busy,
        Lie::Failure,
        Lie::EmptyChunks,
        Lie::EmptyMessages,
        Lie::EndlessSpent,
        Lie::OtherRange,
    ];
    let (mut swarm, _liars) = network(4 * MIB, LIARS, &lies);
    let truth = Truth::of(&swarm, "film");
    let honest: Vec<_> = (0..3).map(|_| vec![truth.offer(FILM, &[])]).collect();
    let honest = Liar::all(&swarm, honest);
    let peer = add_honest(&mut swarm, LIARS + honest.len());
    let mut honest: Vec<_> = honest.iter().map(|peer| &*peer.peer_id).collect();
    honest.push(&peer);
    assert_fetched(&swarm, Duration::from_secs(60), &honest);
}

#[test]
fn a_flood_of_hints_takes_no_memory() {
    /// Without the flood it is less than half of that.
    const MOST: u64 = 80 * MIB;
    let mut swarm = Swarm::start();
    swarm.write("film", 4 * MIB, "film");
    let truth = Truth::of(&swarm, "film");
    let offer = || vec![truth.offer(FILM, &[Lie::Hints, Lie::Silence])];
    let liars = Liar::all(&swarm, vec![offer(), offer(), offer()]);
    swarm.same("film", &format!("a-files/{FILM}"));
    swarm.sharing_peer("a", &["--upload-limit", "64KiB"]);
    swarm.join("sink");
    swarm.wait_listed("sink", FILM, liars.len() + 1);
    let get = get(&swarm);
    let began = Instant::now();
    wait_until("hints are told", PATIENCE, || {
        let is_enough = liars[0].lied() > 500_000 || began.elapsed() > Duration::from_secs(12);
        (liars[0].lied() > 0 && is_enough).then_some(())
    });
    let memory = get.peak_memory();
    swarm.run("a", ["limit", "--upload", "none"]).ok();
    assert!(
        memory < MOST,
        "{memory} bytes after {} hints",
        liars[0].lied()
    );
    get.finish(PATIENCE).ok();
    swarm.assert_same("film", "copy");
}

/// Verified bytes from one source so far.
fn bytes_so_far(get: &Process, peer_id: &str) -> u64 {
    let events = get.stdout();
    let events = events
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let progress = events.filter(|event| event["event"] == "progress");
    progress
        .map(|progress| bytes_from(&progress, peer_id))
        .max()
        .unwrap_or_default()
}

#[test]
fn a_peer_that_has_half_of_one_file_and_all_of_another_gives_both() {
    const HALF: u64 = 6 * MIB;
    let mut swarm = Swarm::start();
    swarm.write("seed-files/w/a.bin", 2 * HALF, "a");
    swarm.write("seed-files/w/b.bin", MIB, "b");
    swarm.sharing_peer("seed", &["--upload-limit", "64KiB"]);
    let part = "p-downloads/w/a.bin.part";
    leave_part(&swarm, "seed-files/w/a.bin", part, |i| (i as u64) < HALF);
    swarm.same("seed-files/w/b.bin", "p-downloads/w/b.bin");
    swarm.join("p");
    let peer = swarm.start_peer("p", &["--downloads", "p-downloads"]);
    swarm.wait_listed("p", "w/a.bin", 1);
    let fetching = swarm.spawn("p", ["get", "w/a.bin", "--json"]);
    for name in ["w/a.bin", "w/b.bin"] {
        swarm.wait_listed("p", name, 2);
    }
    let wants = [("one", "w/a.bin", HALF), ("tree", "w/", HALF + MIB)];
    for (member, what, least) in wants {
        swarm.join(member);
        let output = format!("{member}-copy/");
        let get = swarm.spawn(member, ["get", what, "-o", &output, "--json"]);
        let what = format!("all that {peer} has of {what} is fetched from it");
        wait_until(&what, Duration::from_secs(30), || {
            (bytes_so_far(&get, &peer) >= least * 9 / 10).then_some(())
        });
        drop(get);
    }
    drop(fetching);
    swarm.run("seed", ["limit", "--upload", "none"]).ok();
    let got = swarm
        .run("tree", ["get", "w/", "-o", "tree-copy/", "--json"])
        .ok();
    assert_eq!(got.summary()["files"], 2, "{got:#?}");
}
