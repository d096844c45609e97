//! A swarm in which almost half of the members lie: what is true still gets to everybody, and a lie costs little.

use serde_json::Value;

use crate::{
    liar::{Liar, Lie},
    main_job::{bytes_from, slow_source},
    process::{Outcome, PATIENCE, wait_until},
    swarm::{MIB, Swarm},
};

const FILM: &str = "movies/film.mkv";
const SIZE: u64 = 24 * MIB + 4_321;
const PIECE: u64 = 64 << 10;
/// What a source may be asked for before its first piece was looked at; no more than that piece is read.
const FIRST_CLAIM: u64 = MIB;
/// Wrong pieces by which a source is given up; from the second on it is asked for one at a time.
const MAX_LIES: u64 = 3;

/// Was this source found out, by what a `get --json` told so far?
fn is_found_out(said: &str, peer_id: &str) -> bool {
    let is_out = |source: &Value| {
        source["peer"] == peer_id && (source["state"] == "banned" || source["state"] == "gone")
    };
    let events = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events
        .filter(|event| event["event"] == "progress")
        .any(|event| event["sources"].as_array().unwrap().iter().any(is_out))
}

/// Who is said to have lied, in the notes of a `get --json`.
fn accused(outcome: &Outcome) -> Vec<String> {
    let is_ban =
        |event: &Value| event["event"] == "note" && event["text"].to_string().contains("banned");
    outcome
        .json()
        .iter()
        .filter(|event| is_ban(event))
        .map(|event| event["peer"].as_str().unwrap().into())
        .collect()
}

#[test]
fn a_swarm_of_eight_with_three_liars_brings_the_true_bytes_to_everybody() {
    let members = ["a", "b", "c", "d"];
    let mut swarm = Swarm::start();
    swarm.write("film", SIZE, "film");
    let (seed, link) = slow_source(&mut swarm, "seed", 256 << 10);
    let liars =
        [Lie::Bytes, Lie::Hash, Lie::Have].map(|lie| Liar::start(&swarm, "film", FILM, lie));
    let mut honest = vec![seed];
    for member in members {
        swarm.join(member);
        honest.push(swarm.start_peer(member, &["--downloads", &format!("{member}-downloads")]));
        swarm.wait_listed(member, FILM, 4);
    }

    let gets = members.map(|member| swarm.spawn(member, ["get", FILM, "--json"]));
    // The truth comes so slowly that everybody asks the liars, too.
    for (get, liar) in gets
        .iter()
        .flat_map(|get| liars[..2].iter().map(move |liar| (get, liar)))
    {
        let what = format!("the liar {} is found out", liar.peer_id);
        wait_until(&what, PATIENCE, || {
            is_found_out(&get.stdout(), &liar.peer_id).then_some(())
        });
    }
    link.set(8 * MIB);
    for (member, get) in members.into_iter().zip(gets) {
        let get = get.finish(PATIENCE).ok();
        let folder = format!("{member}-downloads");
        swarm.assert_same("film", &format!("{folder}/{FILM}"));
        assert_eq!(
            swarm.files_in(&folder),
            [FILM],
            "no `.part` and no journal is left"
        );

        let summary = get.summary();
        let true_bytes: u64 = honest
            .iter()
            .map(|peer_id| bytes_from(&summary, peer_id))
            .sum();
        assert_eq!(
            (true_bytes, &summary["bytes_fetched"]),
            (SIZE, &SIZE.into()),
            "{summary}"
        );
        for liar in &liars {
            assert_eq!(bytes_from(&summary, &liar.peer_id), 0, "{summary}");
        }
        // A piece for each ban. The rest came twice: late pieces are raced for.
        let most = 2 * MAX_LIES * PIECE + SIZE / 4;
        assert!(
            summary["bytes_wasted"].as_u64().unwrap() <= most,
            "{summary}"
        );
        // Of a wrong manifest the receiver may have heard before it asked for bytes.
        assert!(accused(&get).contains(&liars[0].peer_id), "{get:#?}");
        assert!(
            honest
                .iter()
                .all(|peer_id| !accused(&get).contains(peer_id)),
            "an honest one is blamed: {get:#?}"
        );
    }
    for liar in &liars {
        let most = members.len() as u64 * (FIRST_CLAIM + (MAX_LIES - 1) * PIECE);
        assert!(
            liar.sent() <= most,
            "{} wrong bytes were taken, asked {} times",
            liar.sent(),
            liar.asked()
        );
    }
}
