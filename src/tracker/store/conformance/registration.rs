//! Libraries come, change and go: in one step or not at all.

use std::{collections::BTreeMap, pin::pin};

use rand::seq::SliceRandom;

use super::*;

pub(super) async fn full_replaces(store: &Shared) {
    full(store, 1, 1, &[file("a", 1), file("b", 2)]).await;
    full(store, 1, 2, &[file("b", 2), file("c", 3)]).await;
    assert_eq!(everything(store).await, ["b", "c"]);
    full(store, 1, 2, &[file("b", 2), file("c", 3)]).await;
    assert_eq!(
        everything(store).await,
        ["b", "c"],
        "saying it twice is saying it once"
    );

    let library = |name: &str| {
        (0..5000)
            .map(|n| file(&format!("{name}/{n:04}"), n))
            .collect::<Vec<_>>()
    };
    let [old, new] = ["old", "new"].map(library);
    full(store, 1, 3, &old).await;
    let mut change = pin!(full(store, 1, 4, &new));
    let ends = [
        key("old/0000", 0),
        key("old/4999", 4999),
        key("new/0000", 0),
        key("new/4999", 4999),
    ];
    loop {
        let done = futures_util::poll!(&mut change).is_ready();
        let there = store.rows_at(&ends, false).await.unwrap();
        let there: Vec<FileKey> = there.iter().map(Row::key).collect();
        assert!(
            there == ends[2..] || !done && there == ends[..2],
            "all of the old until all of the new: {there:?}"
        );
        if done {
            break;
        }
    }
    full(store, 1, 5, &[]).await;
    assert_eq!(everything(store).await, [""; 0]);
    assert_eq!(
        store.heartbeat(peer(1), 5, Instant::now()).await,
        Ok(Heartbeat::Renewed),
        "empty is not unknown"
    );
}

pub(super) async fn abandoned_changes_nothing(store: &Shared) {
    full(store, 1, 1, &[file("a", 1)]).await;
    let before = store.stats().await.unwrap();
    drop(registration(store, from(1, 2), None, &[file("b", 2)]));
    let library: Vec<FileInfo> = (0..5000).map(|n| file(&format!("{n}"), n)).collect();
    {
        let mut register = pin!(full(store, 1, 2, &library));
        assert!(futures_util::poll!(&mut register).is_pending());
    }
    assert_eq!(everything(store).await, ["a"]);
    assert_eq!(
        store.heartbeat(peer(1), 1, Instant::now()).await,
        Ok(Heartbeat::Renewed)
    );
    store.sweep(Instant::now()).await.unwrap();
    assert_eq!(
        store.stats().await.unwrap(),
        before,
        "nothing is left behind"
    );
}

pub(super) async fn deltas(store: &Shared) {
    assert_eq!(
        delta(store, 1, 1, &[file("a", 1)], &[]).await,
        Registered::Stale,
        "unknown peer"
    );
    full(store, 1, 1, &[file("a", 1), file("b", 2)]).await;
    let renamed = delta(
        store,
        1,
        1,
        &[file("c", 1), file("b", 2)],
        &[key("a", 1), key("never", 1), key("b", 2)],
    )
    .await;
    assert_eq!(renamed, Registered::Accepted);
    assert_eq!(
        everything(store).await,
        ["b", "c"],
        "removals come before additions"
    );
    assert_eq!(
        delta(store, 1, 1, &[file("d", 4)], &[]).await,
        Registered::Stale,
        "that base is gone"
    );
    assert_eq!(everything(store).await, ["b", "c"]);
    assert_eq!(
        store.heartbeat(peer(1), 2, Instant::now()).await,
        Ok(Heartbeat::Renewed)
    );

    assert_eq!(
        delta(store, 1, 2, &[partial("b", 2)], &[]).await,
        Registered::Accepted
    );
    assert!(store.rows_at(&[key("b", 2)], false).await.unwrap()[0].sources[0].partial);
    assert_eq!(
        delta(store, 1, 3, &[file("b", 2)], &[]).await,
        Registered::Accepted
    );
    assert!(!store.rows_at(&[key("b", 2)], false).await.unwrap()[0].sources[0].partial);

    let many: Vec<FileInfo> = (0..=u32::try_from(MAX_DELTA).unwrap())
        .map(|n| file("many", n))
        .collect();
    assert_eq!(
        delta(store, 1, 4, &many, &[]).await,
        Registered::Stale,
        "a full library is cheaper"
    );
    assert_eq!(everything(store).await, ["b", "c"]);
    let moved = Announcement {
        addresses: vec!["10.9.9.9:1".into()],
        ..from(1, 5)
    };
    store
        .register(registration(store, moved, Some(4), &[]), Instant::now())
        .await
        .unwrap();
    assert_eq!(
        rows(store, Query::default()).await[0].sources[0].addresses,
        ["10.9.9.9:1"]
    );
}

pub(super) async fn leaving(store: &Shared) {
    let now = Instant::now();
    assert_eq!(
        store.heartbeat(peer(1), 1, now).await,
        Ok(Heartbeat::Unknown)
    );
    assert_eq!(store.leave(peer(1), 1).await, Ok(false));
    full(store, 1, 4, &[file("a", 1), file("b", 2)]).await;
    full(store, 2, 1, &[file("a", 1)]).await;
    assert_eq!(store.heartbeat(peer(1), 3, now).await, Ok(Heartbeat::Stale));
    assert_eq!(
        store.leave(peer(1), 3).await,
        Ok(false),
        "an earlier incarnation cannot say goodbye"
    );
    assert_eq!(everything(store).await, ["a", "b"]);
    assert_eq!(store.leave(peer(1), 4).await, Ok(true));
    assert_eq!(everything(store).await, ["a"]);
    assert_eq!(
        sources(&rows(store, Query::default()).await[0]),
        [(peer(2), false)].into()
    );
    assert_eq!(
        store.heartbeat(peer(1), 4, now).await,
        Ok(Heartbeat::Unknown)
    );

    assert_eq!(store.evict(peer(1)).await, Ok(false));
    assert_eq!(store.evict(peer(2)).await, Ok(true));
    assert_eq!(everything(store).await, [""; 0]);
    let library: Vec<FileInfo> = (0..5000).map(|n| file(&format!("{n}"), n)).collect();
    let mut late = pin!(store.register(registration(store, from(3, 1), None, &library), now));
    assert!(futures_util::poll!(&mut late).is_pending());
    store.evict(peer(3)).await.unwrap();
    assert_eq!(
        late.await,
        Ok(Registered::Stale),
        "who is thrown out does not slip in"
    );
    let stats = store.stats().await.unwrap();
    assert_eq!(
        stats,
        Stats {
            budget_bytes: DEFAULT_BUDGET,
            ..Stats::default()
        }
    );
}

/// Random calls of a few peers over a few names, against the plainest thing that could be right.
pub(super) async fn like_a_model(store: &Shared) {
    let mut rng = StdRng::seed_from_u64(29);
    let mut model: BTreeMap<u32, (u64, BTreeMap<FileKey, bool>)> = BTreeMap::new();
    let mut generation = 0;
    for _ in 0..1500 {
        let n = rng.random_range(0..4);
        let mut files: Vec<FileInfo> = (0..24)
            .map(|f| FileInfo {
                partial: rng.random_bool(0.3),
                ..file(&format!("{}", f % 6), f % 5)
            })
            .collect();
        files.shuffle(&mut rng);
        files.truncate(rng.random_range(0..12));
        let entries: BTreeMap<FileKey, bool> = files
            .iter()
            .map(|file| (file.key(), file.partial))
            .collect();
        generation += 2;
        match (rng.random_range(0..10), model.get_mut(&n)) {
            (0, held) => {
                assert_eq!(
                    store.leave(peer(n), held.map_or(1, |held| held.0)).await,
                    Ok(model.remove(&n).is_some())
                );
            }
            (1, _) => assert_eq!(store.evict(peer(n)).await, Ok(model.remove(&n).is_some())),
            (2..8, Some(held)) => {
                let removed: Vec<FileKey> = held
                    .1
                    .keys()
                    .filter(|_| rng.random_bool(0.2))
                    .cloned()
                    .collect();
                assert_eq!(
                    delta(store, n, held.0, &files, &removed).await,
                    Registered::Accepted
                );
                held.0 += 1;
                held.1.retain(|key, _| !removed.contains(key));
                held.1.extend(entries);
            }
            _ => {
                full(store, n, generation, &files).await;
                model.insert(n, (generation, entries));
            }
        }
        let keys: BTreeSet<&FileKey> = model.values().flat_map(|held| held.1.keys()).collect();
        let listed = rows(store, Query::default()).await;
        assert!(listed.iter().map(Row::key).eq(keys.into_iter().cloned()));
        for row in listed {
            let holds = |held: &BTreeMap<FileKey, bool>| {
                let names = held
                    .iter()
                    .filter(|(key, _)| key.content_id == row.content_id);
                names.map(|(_, partial)| *partial).reduce(|a, b| a && b)
            };
            let holders = model
                .iter()
                .filter_map(|(n, held)| Some((peer(*n), holds(&held.1)?)));
            assert_eq!(sources(&row), holders.collect());
        }
    }
    for n in 0..4 {
        store.evict(peer(n)).await.unwrap();
    }
    assert_eq!(
        store.stats().await.unwrap(),
        Stats {
            budget_bytes: DEFAULT_BUDGET,
            ..Stats::default()
        }
    );
}

pub(super) async fn budget(store: &Shared) {
    let library = |name: &str, n| {
        (0..n)
            .map(|n| file(&format!("{name}{n}"), n))
            .collect::<Vec<_>>()
    };
    full(store, 1, 1, &library("a", 100)).await;
    let held = store.stats().await.unwrap();
    assert!(
        held.used_bytes > 100 * 100 && held.used_bytes < 100 * 2000,
        "{held:?}"
    );
    let exhausted = StoreError::Exhausted {
        what: "the tracker's memory budget",
    };
    let now = Instant::now();
    for base in [None, Some(1)] {
        let more = registration(store, from(1, 2), base, &library("b", 450));
        assert_eq!(store.register(more, now).await, Err(exhausted.clone()));
        assert_eq!(store.stats().await.unwrap(), held, "all is given back");
        assert_eq!(
            store.heartbeat(peer(1), 1, now).await,
            Ok(Heartbeat::Renewed),
            "nothing changed"
        );
    }
    let mut endless = Registration::new(from(2, 1), None, store.budget());
    let refused = (0..)
        .map(|n| endless.add(file(&format!("{n}"), n)))
        .find(Result::is_err);
    assert_eq!(
        refused,
        Some(Err(exhausted)),
        "what is still arriving counts"
    );
    assert!(
        endless.add(file("0", 0)).is_ok(),
        "what is there may be said again"
    );
    drop(endless);
    full(store, 1, 2, &library("c", 100)).await;
    assert_eq!(store.stats().await.unwrap(), held);
    store.leave(peer(1), 2).await.unwrap();
    assert_eq!(store.stats().await.unwrap().used_bytes, 0);
}
