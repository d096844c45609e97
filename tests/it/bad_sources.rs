//! One honest source and one bad one: whatever the bad one does, the file arrives, it is the right one, no more than a
//! piece came in vain, and nobody waits for the bad one at the end.

use serde_json::Value;

use crate::{
    liar::{Liar, Lie},
    main_job::{bytes_from, slow_source, wait_progress},
    process::{PATIENCE, Process, wait_until},
    slow_link::{End, SlowLink},
    swarm::{MIB, Swarm, free_port},
};

const FILM: &str = "movies/film.mkv";
const SIZE: u64 = 4 * MIB + 321;
/// A piece for a lie, and some that were raced for.
const MOST_WASTED: u64 = 4 * (64 << 10);
/// So slow that the other source is asked, too.
const CRAWL: u64 = 128 << 10;
const FAST: u64 = 64 * MIB;

fn network() -> Swarm {
    let swarm = Swarm::start();
    swarm.write("film", SIZE, "film");
    swarm.join("sink");
    swarm
}

/// A peer that shares the film over a link that ends after so many bytes; gives its id and the link.
fn failing_source(swarm: &mut Swarm, after: u64, end: End) -> (String, SlowLink) {
    swarm.same("film", &format!("bad-files/{FILM}"));
    let port = free_port();
    let link = SlowLink::ending(port, FAST, after, end);
    let (listen, advertise) = (format!("127.0.0.1:{port}"), link.address.to_string());
    (
        swarm.sharing_peer("bad", &["--listen", &listen, "--advertise", &advertise]),
        link,
    )
}

fn get(swarm: &Swarm) -> Process {
    swarm.spawn("sink", ["get", FILM, "-o", "copy.mkv", "--json"])
}

/// The file is there, all of it was fetched from these, and no more than this came in vain; gives what the command said.
#[track_caller]
fn assert_fetched(swarm: &Swarm, get: Process, from: &[&str], wasted: u64) -> Vec<Value> {
    let got = get.finish(PATIENCE).ok();
    swarm.assert_same("film", "copy.mkv");
    assert_eq!(
        swarm
            .files_in(".")
            .iter()
            .filter(|name| name.starts_with("copy.mkv"))
            .count(),
        1
    );
    let summary = got.summary();
    assert_eq!(summary["bytes_fetched"], SIZE, "{summary}");
    assert_eq!(
        from.iter()
            .map(|peer| bytes_from(&summary, peer))
            .sum::<u64>(),
        SIZE,
        "{summary}"
    );
    assert!(
        summary["bytes_wasted"].as_u64().unwrap() <= wasted,
        "{summary}"
    );
    got.json()
}

/// A liar beside a source that is slow until the liar was asked, or found out.
fn survives(lie: Lie) -> (Liar, Vec<Value>) {
    let mut swarm = network();
    let liar = Liar::start(&swarm, "film", FILM, lie);
    let (honest, link) = slow_source(&mut swarm, "honest", CRAWL);
    swarm.wait_listed("sink", FILM, 2);
    let get = get(&swarm);
    let said = || {
        get.stdout()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect::<Vec<_>>()
    };
    let is_met = || liar.asked() > 0 || !notes(&said(), &liar.peer_id).is_empty();
    wait_until("the liar was met", PATIENCE, || is_met().then_some(()));
    link.set(FAST);
    let said = assert_fetched(&swarm, get, &[&honest], MOST_WASTED);
    (liar, said)
}

fn notes<'a>(said: &'a [Value], peer_id: &str) -> Vec<&'a str> {
    let of_peer = said
        .iter()
        .filter(|event| event["event"] == "note" && event["peer"] == peer_id);
    of_peer.map(|note| note["text"].as_str().unwrap()).collect()
}

#[test]
fn wrong_bytes_cost_one_piece() {
    let (liar, said) = survives(Lie::Bytes);
    assert_eq!(
        liar.asked(),
        1,
        "one lane asks before the first piece was seen"
    );
    assert!(said.last().unwrap()["bytes_wasted"].as_u64().unwrap() > 0);
    let notes = notes(&said, &liar.peer_id);
    assert!(
        matches!(notes[..], [note] if note.contains("banned for a while: sent wrong bytes")),
        "{notes:?}"
    );
}

#[test]
fn a_wrong_manifest_is_said() {
    let (liar, said) = survives(Lie::Hash);
    let notes = notes(&said, &liar.peer_id);
    // If the true manifest came first, it is asked for bytes.
    assert!(
        matches!(notes[..], [note] if note.contains(": sent wrong bytes")),
        "{notes:?}"
    );
}

#[test]
fn pieces_that_are_not_there_are_fetched_elsewhere() {
    survives(Lie::Denial);
}

#[test]
fn the_only_source_is_asked_again_for_what_it_did_not_have() {
    let swarm = network();
    for (name, size) in [("film", SIZE), ("still", 100_000)] {
        swarm.write(name, size, name);
        let liar = Liar::start(&swarm, name, name, Lie::Delay);
        swarm.wait_listed("sink", name, 1);
        let got = swarm
            .run("sink", ["get", name, "-o", "copy", "--json"])
            .ok();
        swarm.assert_same(name, "copy");
        assert_eq!(
            (got.summary()["bytes_fetched"].as_u64(), liar.asked() > 2),
            (Some(size), true)
        );
        std::fs::remove_file(swarm.path("copy")).unwrap();
    }
}

#[test]
fn promises_that_nobody_keeps_are_not_waited_for() {
    survives(Lie::Have);
}

#[test]
fn a_byte_a_second_is_not_waited_for() {
    survives(Lie::Trickle);
}

#[test]
fn a_silent_answer_is_not_waited_for() {
    survives(Lie::Silence);
}

#[test]
fn a_silent_server_is_not_waited_for() {
    survives(Lie::SilentTls);
}

#[test]
fn a_silent_port_is_not_waited_for() {
    survives(Lie::SilentTcp);
}

#[test]
fn a_line_that_is_reset_is_done_without() {
    let mut swarm = network();
    let (bad, _link) = failing_source(&mut swarm, MIB, End::Reset);
    let (honest, link) = slow_source(&mut swarm, "honest", CRAWL);
    swarm.wait_listed("sink", FILM, 2);
    let get = get(&swarm);
    wait_until("a connection is lost", PATIENCE, || {
        get.stdout().contains("lost, trying again").then_some(())
    });
    link.set(FAST);
    // While the honest one crawled, its pieces were raced for.
    assert_fetched(&swarm, get, &[&bad, &honest], SIZE / 2);
}

#[test]
fn a_source_that_vanishes_in_the_last_piece_is_not_waited_for() {
    let mut swarm = network();
    let (bad, _link) = failing_source(&mut swarm, SIZE - 100_000, End::Silence);
    swarm.wait_listed("sink", FILM, 1);
    let mut get = get(&swarm);
    wait_progress(&mut get, 0.8);
    let (honest, _link) = slow_source(&mut swarm, "honest", FAST);
    assert_fetched(&swarm, get, &[&bad, &honest], MOST_WASTED);
}

#[test]
fn a_source_that_comes_back_at_another_port_is_found_again() {
    let mut swarm = network();
    let (source, _link) = slow_source(&mut swarm, "source", 8 * CRAWL);
    swarm.wait_listed("sink", FILM, 1);
    let mut get = get(&swarm);
    wait_progress(&mut get, 0.3);
    swarm.kill("source");
    assert_eq!(swarm.sharing_peer("source", &[]), source);
    let got = get.finish(PATIENCE).ok();
    swarm.assert_same("film", "copy.mkv");
    assert!(bytes_from(&got.summary(), &source) >= SIZE, "{got:#?}");
}
