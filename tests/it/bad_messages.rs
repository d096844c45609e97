//! Sources that break the rules of the protocol, each in one way: messages that never come, come twice, at the wrong time,
//! or are about something else. Beside an honest source the files arrive; alone, each ends a get in time, with the right
//! code, and is not asked again and again.

use std::time::{Duration, Instant};

use crate::{
    liar::{Liar, Lie, Truth},
    process::{PATIENCE, wait_until},
    slow_link::SlowLink,
    swarm::{Swarm, free_port},
};

/// Six pieces, so that there is a manifest.
const LONG: u64 = 380_000;
/// One piece, without a manifest.
const SHORT: u64 = 100_000;
/// Four seconds without anything useful, on a slow and busy machine.
const GIVEN_UP: Duration = Duration::from_secs(40);
/// Gets that are tried side by side: some of them keep the peer busy.
const AT_ONCE: usize = 9;
/// How long the honest source is slow at most.
const MEETING: Duration = Duration::from_secs(20);
/// Calls that one source is worth which never brings anything.
const MOST_CALLS: usize = 200;

/// How a get of a long file may end that only this liar has.
fn endings(lie: Lie) -> &'static [i32] {
    match lie {
        Lie::Bytes | Lie::Hash | Lie::Size => &[6],
        Lie::SilentTls
        | Lie::SilentTcp
        | Lie::Closed
        | Lie::Deaf
        | Lie::Unknown
        | Lie::Denial
        | Lie::Promised
        | Lie::Busy
        | Lie::Failure
        | Lie::Silence
        | Lie::Trickle
        | Lie::ManifestNever
        | Lie::ManifestTrickle => &[4, 6],
        Lie::ManifestEnds
        | Lie::ManifestEmpty
        | Lie::ManifestOfOther
        | Lie::OutOfRange
        | Lie::EmptyChunks
        | Lie::EmptyMessages
        | Lie::EndlessSpent => &[4, 6],
        Lie::Delay | Lie::NewsNever | Lie::NewsEnd | Lie::NewsRefused | Lie::NewsTwice => &[0],
        // Nobody need put up with it, and nobody must not.
        _ => &[0, 4, 6, 12],
    }
}

#[test]
fn alone_each_ends_a_get_in_time() {
    let mut swarm = Swarm::start();
    let name = |lie: Lie| format!("{lie:?}");
    let offers = Lie::all().into_iter().map(|lie| {
        swarm.write(&name(lie), LONG, &name(lie));
        vec![Truth::of(&swarm, &name(lie)).offer(&name(lie), &[lie])]
    });
    let liars = Liar::all(&swarm, offers.collect());
    swarm.join("sink");
    swarm.start_peer("sink", &[]);
    swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() == liars.len()).then_some(())
    });
    let mut wrong = vec![];
    let all: Vec<_> = Lie::all().into_iter().zip(&liars).collect();
    for some in all.chunks(AT_ONCE) {
        let began = Instant::now();
        let gets = some.iter().map(|(lie, liar)| {
            let target = format!("copy/{lie:?}");
            let flags = ["-o", &target, "--timeout", "4s"];
            let get = swarm.spawn("sink", [&["get", &*name(*lie)], &flags[..]].concat());
            (*lie, *liar, get)
        });
        let mut gets: Vec<_> = gets.collect();
        wait_until("all end, or it is too late", PATIENCE, || {
            let all_ended = gets.iter_mut().all(|(.., get)| !get.is_running());
            (all_ended || began.elapsed() > GIVEN_UP).then_some(())
        });
        for (lie, liar, mut get) in gets {
            if get.is_running() {
                wrong.push(format!("{lie:?} does not end"));
                continue;
            }
            let got = get.finish(PATIENCE);
            let code = got.code.unwrap_or_default();
            if !endings(lie).contains(&code) {
                wrong.push(format!("{lie:?} ends with {code}: {}", got.stderr));
            }
            if liar.calls() > MOST_CALLS {
                wrong.push(format!("{lie:?} is called {} times", liar.calls()));
            }
            let target = format!("copy/{lie:?}");
            assert_eq!(swarm.path(&target).exists(), code == 0, "{got:#?}");
            if code == 0 {
                swarm.assert_same(&name(lie), &target);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Was the liar there to be met before the honest source was fast?
fn is_met(lie: Lie, liar: &Liar) -> bool {
    match lie {
        Lie::Closed | Lie::Deaf => true,
        // Whoever has the manifest asks for no other.
        _ if Lie::ABOUT_MANIFESTS.contains(&lie) => liar.calls() > 0,
        _ => liar.lied() > 0,
    }
}

#[test]
fn beside_an_honest_source_each_is_survived() {
    let mut swarm = Swarm::start();
    let names = |lie: Lie| ["long", "short"].map(|which| format!("{lie:?}/{which}"));
    let offers = Lie::all().into_iter().map(|lie| {
        let offers = names(lie).into_iter().zip([LONG, SHORT]);
        let offers = offers.map(|(name, size)| {
            let path = format!("a-files/{name}");
            swarm.write(&path, size, &name);
            Truth::of(&swarm, &path).offer(&name, &[lie])
        });
        offers.collect()
    });
    let liars = Liar::all(&swarm, offers.collect());
    let port = free_port();
    let link = SlowLink::to(port, 256 << 10);
    let (listen, advertise) = (format!("127.0.0.1:{port}"), link.address.to_string());
    swarm.sharing_peer("a", &["--listen", &listen, "--advertise", &advertise]);
    swarm.join("sink");
    swarm.start_peer("sink", &[]);
    swarm.wait_ls("sink", PATIENCE, |rows| {
        let has_both = rows.iter().all(|row| row["sources"] == 2);
        (has_both && rows.len() == 2 * liars.len()).then_some(())
    });
    let gets: Vec<_> = Lie::all()
        .into_iter()
        .map(|lie| {
            let [long, short] = names(lie);
            swarm.spawn("sink", ["get", &long, &short, "-o", "copy/"])
        })
        .collect();
    let mut unmet = Lie::all();
    let began = Instant::now();
    wait_until("all liars are met, or it is too late", PATIENCE, || {
        let mut each = liars.iter();
        unmet = Lie::all();
        unmet.retain(|lie| each.next().is_some_and(|liar| !is_met(*lie, liar)));
        (unmet.is_empty() || began.elapsed() > MEETING).then_some(())
    });
    assert!(
        unmet.len() < liars.len() / 4,
        "too few were met; not {unmet:?}"
    );
    link.set(64 << 20);
    let began = Instant::now();
    for (lie, get) in Lie::all().into_iter().zip(gets) {
        get.finish(GIVEN_UP.saturating_sub(began.elapsed())).ok();
        for name in names(lie) {
            swarm.assert_same(&format!("a-files/{name}"), &format!("copy/{name}"));
        }
    }
}
