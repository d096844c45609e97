//! Who is heard of stays, who is not goes, and the tracker's own silence counts against nobody.

use super::*;

const BEAT: Duration = Duration::from_secs(10);

/// What time does.
pub(in super::super) async fn leases(open: impl AsyncFn(Arc<Budget>) -> Shared) {
    let fresh = async || open(Budget::new(DEFAULT_BUDGET)).await;
    expires_on_time(&fresh().await).await;
    beats_keep_alive(&fresh().await).await;
    pauses_do_not_count(&fresh().await).await;
    expires_many(&fresh().await).await;
}

/// Sweeps as the service does, for a while; gives who went and the time then.
async fn run(store: &Shared, from: Instant, time: Duration) -> (Vec<PeerId>, Instant) {
    let (mut gone, mut now) = (Vec::new(), from);
    while now < from + time {
        now = (now + SWEEP_INTERVAL).min(from + time);
        gone.extend(store.sweep(now).await.unwrap());
    }
    (gone, now)
}

async fn expires_on_time(store: &Shared) {
    let second = Duration::from_secs(1);
    let begin = Instant::now();
    full_at(store, 1, 1, &[file("a", 1), file("b", 2)], begin).await;
    full_at(store, 2, 1, &[file("a", 1)], begin).await;
    let (gone, now) = run(store, begin, LEASE - second).await;
    assert_eq!(gone, [], "not before");
    assert_eq!(store.heartbeat(peer(2), 7, now).await, Ok(Heartbeat::Stale));
    let (gone, now) = run(store, now, second).await;
    assert_eq!(gone, [peer(1)], "not after");
    assert_eq!(
        everything(store).await,
        ["a"],
        "a stale heartbeat renews too"
    );
    assert_eq!(
        store.heartbeat(peer(1), 1, now).await,
        Ok(Heartbeat::Unknown)
    );
    let (gone, now) = run(store, now, LEASE - second).await;
    assert_eq!(gone, [peer(2)]);
    assert_eq!(store.stats().await.unwrap().used_bytes, 0);

    full_at(store, 1, 1, &[file("a", 1)], now).await;
    let (_, now) = run(store, now, LEASE - second).await;
    let amended = registration(store, from(1, 2), Some(1), &[]);
    store.register(amended, now).await.unwrap();
    assert_eq!(
        run(store, now, LEASE - second).await.0,
        [],
        "a delta renews"
    );
}

async fn beats_keep_alive(store: &Shared) {
    let mut now = Instant::now();
    full_at(store, 1, 1, &[file("a", 1)], now).await;
    for beat in 0..24 * 360 {
        let (gone, then) = run(store, now, BEAT).await;
        assert_eq!(gone, []);
        now = then;
        if beat % 20 != 0 {
            assert_eq!(
                store.heartbeat(peer(1), 1, now).await,
                Ok(Heartbeat::Renewed)
            );
        }
    }
}

async fn pauses_do_not_count(store: &Shared) {
    let begin = Instant::now();
    full_at(store, 1, 1, &[file("a", 1)], begin).await;
    full_at(store, 2, 1, &[file("b", 1)], begin).await;
    let (_, now) = run(store, begin, BEAT).await;
    let woken = now + 2 * LEASE;
    assert_eq!(store.sweep(woken).await, Ok(vec![]));
    let (gone, now) = run(store, woken, LEASE - BEAT - SWEEP_INTERVAL).await;
    assert_eq!(gone, [], "the lease goes on where it was");
    let woken = now + 2 * LEASE;
    assert_eq!(
        store.heartbeat(peer(1), 1, woken).await,
        Ok(Heartbeat::Renewed),
        "whatever call comes first"
    );
    assert_eq!(run(store, woken, SWEEP_INTERVAL).await.0, [peer(2)]);
}

async fn expires_many(store: &Shared) {
    let begin = Instant::now();
    for n in 0..5000 {
        full_at(
            store,
            n,
            1,
            &[file(&format!("{n}"), n), file("all", 0)],
            begin,
        )
        .await;
    }
    let (gone, _) = run(store, begin, LEASE).await;
    assert_eq!(
        gone.into_iter().collect::<BTreeSet<_>>(),
        (0..5000).map(peer).collect()
    );
    assert_eq!(
        store.stats().await.unwrap(),
        Stats {
            budget_bytes: DEFAULT_BUDGET,
            ..Stats::default()
        }
    );
}
