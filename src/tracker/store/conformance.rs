//! The one suite that every store must pass. [`suite`] needs no clock; [`leases`] passes its own time, a day in a moment.
//! Stores are opened empty, with leases of [`LEASE`].

use std::collections::BTreeSet;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::broadcast::error::TryRecvError;

use super::*;
use crate::{
    catalog::{ContentPrefix, MAX_SOURCES, Query},
    safe_path::SafeName,
};

mod leases;
mod registration;

pub(super) use leases::leases;

pub(super) const LEASE: Duration = Duration::from_secs(30);

type Shared = Arc<dyn Store>;

/// What holds at any time.
pub(super) async fn suite(open: impl AsyncFn(Arc<Budget>) -> Shared) {
    let fresh = async || open(Budget::new(DEFAULT_BUDGET)).await;
    rows_and_sources(&fresh().await).await;
    many_sources(&fresh().await).await;
    loopback(&fresh().await).await;
    filters(&fresh().await).await;
    pages_while_rows_change(&fresh().await).await;
    registration::full_replaces(&fresh().await).await;
    registration::abandoned_changes_nothing(&fresh().await).await;
    registration::deltas(&fresh().await).await;
    registration::leaving(&fresh().await).await;
    registration::like_a_model(&fresh().await).await;
    watching(&fresh().await).await;
    ten_thousand(&fresh().await).await;
    registration::budget(&open(Budget::new(200_000)).await).await;
}

fn peer(n: u32) -> PeerId {
    PeerId::from_spki(&n.to_be_bytes())
}

fn id(n: u32) -> ContentId {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    ContentId::from_bytes(bytes)
}

fn file(name: &str, content: u32) -> FileInfo {
    let name = SafeName::parse(name).unwrap();
    FileInfo {
        name,
        size: u64::from(content) * 100,
        content_id: id(content),
        partial: false,
    }
}

fn partial(name: &str, content: u32) -> FileInfo {
    FileInfo {
        partial: true,
        ..file(name, content)
    }
}

fn key(name: &str, content: u32) -> FileKey {
    file(name, content).key()
}

fn from(n: u32, generation: u64) -> Announcement {
    Announcement {
        peer: peer(n),
        generation,
        addresses: vec![format!("10.0.0.{n}:7701")],
        seen_over_loopback: false,
    }
}

fn registration(
    store: &Shared,
    by: Announcement,
    base: Option<u64>,
    files: &[FileInfo],
) -> Registration {
    let mut registration = Registration::new(by, base, store.budget());
    for file in files {
        registration.add(file.clone()).unwrap();
    }
    registration
}

async fn full_at(store: &Shared, n: u32, generation: u64, files: &[FileInfo], now: Instant) {
    let full = registration(store, from(n, generation), None, files);
    assert_eq!(store.register(full, now).await, Ok(Registered::Accepted));
}

async fn full(store: &Shared, n: u32, generation: u64, files: &[FileInfo]) {
    full_at(store, n, generation, files, Instant::now()).await;
}

async fn delta(
    store: &Shared,
    n: u32,
    base: u64,
    added: &[FileInfo],
    removed: &[FileKey],
) -> Registered {
    let mut delta = Registration::new(from(n, base + 1), Some(base), store.budget());
    for key in removed {
        delta.remove(key.clone()).unwrap();
    }
    for file in added {
        delta.add(file.clone()).unwrap();
    }
    store.register(delta, Instant::now()).await.unwrap()
}

/// Every row, in pages of a few.
async fn rows(store: &Shared, query: Query) -> Vec<Row> {
    let matcher = query.compile().unwrap();
    let (mut rows, mut after) = (Vec::new(), None);
    loop {
        let page = store
            .list(&matcher, after.as_ref(), 7, false)
            .await
            .unwrap();
        assert!(page.rows.len() <= 7);
        rows.extend(page.rows);
        match page.next {
            Some(next) => assert!(after.replace(next.clone()).is_none_or(|after| after < next)),
            None => return rows,
        }
    }
}

async fn names(store: &Shared, query: Query) -> Vec<String> {
    rows(store, query)
        .await
        .into_iter()
        .map(|row| row.name.to_string())
        .collect()
}

async fn everything(store: &Shared) -> Vec<String> {
    names(store, Query::default()).await
}

fn sources(row: &Row) -> BTreeSet<(PeerId, bool)> {
    assert_eq!(row.sources.len(), row.source_count as usize);
    row.sources
        .iter()
        .map(|source| (source.peer, source.partial))
        .collect()
}

async fn rows_and_sources(store: &Shared) {
    full(store, 1, 1, &[file("b", 2), file("a", 1), file("both", 3)]).await;
    full(
        store,
        2,
        1,
        &[file("a", 9), file("also-a", 1), partial("both", 3)],
    )
    .await;
    full(store, 3, 1, &[partial("both", 3), file("other", 3)]).await;
    let listed = rows(store, Query::default()).await;
    let keys: Vec<FileKey> = listed.iter().map(Row::key).collect();
    assert_eq!(
        keys,
        [
            key("a", 1),
            key("a", 9),
            key("also-a", 1),
            key("b", 2),
            key("both", 3),
            key("other", 3)
        ],
        "one name over two contents is two rows"
    );
    assert_eq!(
        sources(&listed[0]),
        [(peer(1), false), (peer(2), false)].into(),
        "whatever they call it"
    );
    assert_eq!(sources(&listed[0]), sources(&listed[2]));
    assert_eq!(
        sources(&listed[4]),
        [(peer(1), false), (peer(2), true), (peer(3), false)].into()
    );
    assert_eq!(
        listed[0]
            .sources
            .iter()
            .find(|source| source.peer == peer(1))
            .unwrap()
            .addresses,
        ["10.0.0.1:7701"]
    );

    let mut of_content = store.rows_of(&[id(3), id(77), id(2)], false).await.unwrap();
    of_content.sort_by_key(Row::key);
    assert_eq!(
        of_content.iter().map(Row::key).collect::<Vec<_>>(),
        [key("b", 2), key("both", 3), key("other", 3)]
    );
    let at = store
        .rows_at(&[key("b", 2), key("b", 1), key("nobody", 2)], false)
        .await
        .unwrap();
    assert_eq!(at, [listed[3].clone()]);

    let surveyed: Vec<_> = store
        .survey()
        .await
        .unwrap()
        .into_iter()
        .map(|row| (row.key, row.size, row.n_complete, row.n_partial))
        .collect();
    let counts = [(2, 0), (1, 0), (2, 0), (1, 0), (2, 1), (2, 1)];
    let expected: Vec<_> = listed
        .iter()
        .zip(counts)
        .map(|(row, (whole, part))| (row.key(), row.size, whole, part))
        .collect();
    assert_eq!(surveyed, expected);

    let liar = FileInfo {
        size: 1,
        ..file("a", 1)
    };
    full(store, 4, 1, &[liar]).await;
    let again = store
        .rows_at(&[key("a", 1)], false)
        .await
        .unwrap()
        .remove(0);
    assert_eq!(
        (again.size, again.source_count),
        (100, 3),
        "the first size stays"
    );

    let mut here = store.peers().await.unwrap();
    here.sort_by_key(|record| record.n_files);
    assert_eq!(
        here.iter().map(|record| record.n_files).collect::<Vec<_>>(),
        [1, 2, 3, 3]
    );
    assert_eq!(here[1].announcement, from(3, 1));
    assert_eq!(store.stats().await.unwrap().n_peers, 4);
}

async fn many_sources(store: &Shared) {
    for n in 0..200 {
        full(store, n, 1, &[file("a", 1)]).await;
    }
    let mut seen = BTreeSet::new();
    for _ in 0..40 {
        let row = store
            .rows_at(&[key("a", 1)], false)
            .await
            .unwrap()
            .remove(0);
        assert_eq!(row.source_count, 200);
        assert_eq!(row.sources.len(), MAX_SOURCES);
        let chosen: BTreeSet<PeerId> = row.sources.iter().map(|source| source.peer).collect();
        assert_eq!(chosen.len(), MAX_SOURCES, "each once");
        seen.extend(chosen);
    }
    assert!(seen.len() > 190, "a random choice, not always the same");

    let files: Vec<FileInfo> = (0..300)
        .map(|n| file(&format!("many/{n}"), n + 10))
        .collect();
    for n in 0..64 {
        full(store, n, 2, &files).await;
    }
    let page = store
        .list(&Query::default().compile().unwrap(), None, 1000, false)
        .await
        .unwrap();
    assert!(
        page.next.is_some() && page.rows.len() < 300,
        "a page fits into a message"
    );
    assert_eq!(
        rows(
            store,
            Query {
                glob: Some("many/".into()),
                ..Query::default()
            }
        )
        .await
        .len(),
        300
    );

    for n in 0..64 {
        let by = Announcement {
            addresses: vec![format!("{}:1", "h".repeat(250)); 16],
            ..from(n, 3)
        };
        store
            .register(
                registration(store, by, None, &[file("far", 9)]),
                Instant::now(),
            )
            .await
            .unwrap();
    }
    let row = store
        .rows_at(&[key("far", 9)], false)
        .await
        .unwrap()
        .remove(0);
    assert_eq!(row.source_count, 64);
    assert!((1..64).contains(&row.sources.len()), "so does a single row");
}

async fn loopback(store: &Shared) {
    let addresses = vec!["127.0.0.1:1".to_owned(), "10.0.0.1:1".to_owned()];
    for (n, seen_over_loopback) in [(1, true), (2, false)] {
        let by = Announcement {
            addresses: addresses.clone(),
            seen_over_loopback,
            ..from(n, 1)
        };
        store
            .register(
                registration(store, by, None, &[file("a", n)]),
                Instant::now(),
            )
            .await
            .unwrap();
    }
    for caller in [true, false] {
        let page = store
            .list(&Query::default().compile().unwrap(), None, 9, caller)
            .await
            .unwrap();
        for row in page.rows {
            let told = caller && row.sources[0].peer == peer(1);
            assert_eq!(row.sources[0].addresses, addresses[usize::from(!told)..]);
        }
    }
}

async fn filters(store: &Shared) {
    let first = [
        file("shots/a.mov", 1),
        file("shots/b/c.mov", 2),
        file("shots-2/d.mov", 3),
    ];
    full(store, 1, 1, &first).await;
    full(
        store,
        2,
        1,
        &[file("E.MOV", 4), file("shots/a.mov", 5), file("z", 1)],
    )
    .await;
    let any = Query::default;
    let glob = |glob: &str| Query {
        glob: Some(glob.into()),
        ..any()
    };
    assert_eq!(
        names(store, glob("shots/")).await,
        ["shots/a.mov", "shots/a.mov", "shots/b/c.mov"]
    );
    assert_eq!(
        names(store, glob("shots/*")).await,
        ["shots/a.mov", "shots/a.mov"]
    );
    assert_eq!(names(store, glob("*")).await, ["E.MOV", "z"]);
    let text = Query {
        text: Some(".mOv".into()),
        peer: Some(peer(2)),
        ..any()
    };
    assert_eq!(names(store, text).await, ["E.MOV", "shots/a.mov"]);
    let sizes = Query {
        min_size: 200,
        max_size: Some(400),
        ..any()
    };
    assert_eq!(
        names(store, sizes).await,
        ["E.MOV", "shots-2/d.mov", "shots/b/c.mov"]
    );
    let named = Query {
        name: Some(SafeName::parse("shots/a.mov").unwrap()),
        ..any()
    };
    assert_eq!(rows(store, named.clone()).await.len(), 2);
    assert_eq!(
        rows(
            store,
            Query {
                peer: Some(peer(1)),
                ..named
            }
        )
        .await
        .len(),
        1
    );
    assert_eq!(
        names(
            store,
            Query {
                peer: Some(peer(3)),
                ..any()
            }
        )
        .await,
        [""; 0]
    );
    let content = Query {
        content: Some(id(1).into()),
        ..any()
    };
    assert_eq!(names(store, content.clone()).await, ["shots/a.mov", "z"]);
    assert_eq!(
        names(
            store,
            Query {
                peer: Some(peer(1)),
                ..content.clone()
            }
        )
        .await,
        ["shots/a.mov"]
    );
    assert_eq!(
        names(
            store,
            Query {
                glob: Some("z".into()),
                ..content
            }
        )
        .await,
        ["z"]
    );

    let same: Vec<FileInfo> = (0u8..100)
        .map(|n| FileInfo {
            content_id: ContentId::from_bytes(
                [[7; 31].as_slice(), &[99 - n]].concat().try_into().unwrap(),
            ),
            ..file(&format!("p{n:02}"), 0)
        })
        .collect();
    let prefix = |content: ContentPrefix| Query {
        content: Some(content),
        ..any()
    };
    for (n, n_contents) in [(1, 30), (2, 100)] {
        full(store, 3, n, &same[..n_contents]).await;
        let found = rows(store, prefix("07070707".parse().unwrap())).await;
        assert_eq!(
            found.iter().map(Row::key).collect::<Vec<_>>(),
            same[..n_contents]
                .iter()
                .map(FileInfo::key)
                .collect::<Vec<_>>()
        );
    }
    assert_eq!(
        names(store, prefix(same[5].content_id.into())).await,
        ["p05"]
    );
}

async fn pages_while_rows_change(store: &Shared) {
    let mut rng = StdRng::seed_from_u64(2);
    let stay: Vec<FileInfo> = (0..3000)
        .map(|n| file(&format!("stay/{:04}", n / 2), n))
        .collect();
    full(store, 1, 1, &stay).await;
    for query in [
        Query::default(),
        Query {
            glob: Some("*/**".into()),
            ..Query::default()
        },
    ] {
        let matcher = query.compile().unwrap();
        let (mut seen, mut after, mut generation) = (Vec::new(), None, 1);
        loop {
            let come: Vec<FileInfo> = (0..20)
                .map(|n| file(&format!("stay/{:04}-x", rng.random_range(0..1500)), n))
                .collect();
            generation += 1;
            full(store, 2, generation, &come).await;
            let page = store
                .list(&matcher, after.as_ref(), 100, false)
                .await
                .unwrap();
            seen.extend(page.rows.iter().map(Row::key));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert!(seen.is_sorted_by(|a, b| a < b));
        seen.retain(|key| !key.name.as_str().ends_with('x'));
        assert_eq!(seen, stay.iter().map(FileInfo::key).collect::<Vec<_>>());
    }
    let gone = key("stay/0700-gone", 1);
    let page = store
        .list(&Query::default().compile().unwrap(), Some(&gone), 1, false)
        .await
        .unwrap();
    assert!(
        page.rows[0].key() > gone,
        "a key that is no row is a place all the same"
    );
}

async fn watching(store: &Shared) {
    full(store, 1, 1, &[file("old", 1)]).await;
    let mut watch = store.watch();
    let mut next = async || {
        let mut changes = Vec::new();
        loop {
            match watch.try_recv() {
                Ok(change) => changes.push(change),
                Err(TryRecvError::Empty) => return changes,
                Err(error) => panic!("{error}"),
            }
        }
    };
    use Change::{Changed, Removed, Resync};
    assert_eq!(next().await, [], "only what comes after");
    full(store, 2, 1, &[file("a", 3), file("b", 2)]).await;
    assert_eq!(next().await, [Changed(key("a", 3)), Changed(key("b", 2))]);
    full(store, 2, 2, &[file("a", 3), file("b", 2)]).await;
    assert_eq!(next().await, [], "nothing changed");
    full(store, 2, 3, &[partial("a", 3), file("c", 4)]).await;
    assert_eq!(
        next().await,
        [
            Changed(key("a", 3)),
            Changed(key("c", 4)),
            Removed(key("b", 2))
        ]
    );
    delta(store, 2, 3, &[file("old", 1)], &[key("c", 4)]).await;
    assert_eq!(next().await, [Removed(key("c", 4)), Changed(key("old", 1))]);
    full(store, 3, 1, &[file("new name", 1)]).await;
    assert_eq!(
        next().await,
        [Changed(key("new name", 1)), Changed(key("old", 1))],
        "its sources changed too"
    );
    store.leave(peer(3), 1).await.unwrap();
    assert_eq!(
        next().await,
        [Removed(key("new name", 1)), Changed(key("old", 1))]
    );
    store.evict(peer(2)).await.unwrap();
    assert_eq!(next().await, [Removed(key("a", 3)), Changed(key("old", 1))]);
    full(store, 4, 1, &[file("a", 3)]).await;
    assert_eq!(next().await, [Changed(key("a", 3))]);
    for (generation, base) in [(2, None), (3, Some(2))] {
        let by = Announcement {
            addresses: vec![format!("10.9.9.{generation}:1")],
            ..from(4, generation)
        };
        let entries = if base.is_none() {
            vec![file("a", 3)]
        } else {
            vec![]
        };
        store
            .register(registration(store, by, base, &entries), Instant::now())
            .await
            .unwrap();
        assert_eq!(next().await, [Changed(key("a", 3))], "it moved");
    }
    full(
        store,
        2,
        1,
        &(0..20_000)
            .map(|n| file(&format!("{n}"), n))
            .collect::<Vec<_>>(),
    )
    .await;
    assert_eq!(next().await, [Resync], "too much to tell");
}

async fn ten_thousand(store: &Shared) {
    let begin = Instant::now();
    let files: Vec<FileInfo> = (0..10_000)
        .map(|n| file(&format!("tree/{}/{n}", n % 100), n))
        .collect();
    full(store, 1, 1, &files).await;
    full(store, 2, 1, &files).await;
    for n in 0..100 {
        assert_eq!(
            delta(store, 1, 1 + n, &[file("new", 10_000)], &[]).await,
            Registered::Accepted
        );
        let found = rows(
            store,
            Query {
                content: Some(id(9_999).into()),
                ..Query::default()
            },
        )
        .await;
        assert_eq!(found[0].source_count, 2);
    }
    assert_eq!(everything(store).await.len(), 10_001);
    assert_eq!(
        store.survey().await.unwrap().len(),
        10_001,
        "slice after slice"
    );
    let nothing = Query {
        text: Some("not there".into()),
        ..Query::default()
    };
    assert_eq!(names(store, nothing).await, [""; 0]);
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "took {:?}",
        begin.elapsed()
    );
}
