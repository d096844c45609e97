//! What this process counts, and the text in which Prometheus reads it.
//!
//! Counters are statics, as the log is: who counts needs nobody to be handed a counter by, and counting is one atomic
//! addition. What can be looked up when asked is not counted but measured then, by `metrics.rs` of tracker and peer. The
//! text format (0.0.4) is three kinds of lines, so it is written here; `docs/metrics.md` lists what there is.
//!
//! Invariants: no label holds a name or an id, so the number of series depends on neither peers nor files; names begin
//! with `sprat_` and speak of seconds and bytes.

use std::{
    fmt::{Display, Write},
    fs,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

pub mod rpc;

/// Something that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// `n` more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// One more.
    pub fn one(&self) {
        self.add(1);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How many there are of something now.
#[derive(Debug, Default)]
pub struct Level(AtomicU64);

/// One of a [`Level`], until dropped.
#[derive(Debug)]
pub struct Entered(&'static Level);

impl Level {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// So many now.
    pub fn set(&self, n: usize) {
        self.0.store(n as u64, Ordering::Relaxed);
    }

    /// One more, for as long as the answer lives.
    pub fn enter(&'static self) -> Entered {
        self.0.fetch_add(1, Ordering::Relaxed);
        Entered(self)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Most bounds of a histogram.
const BOUNDS: usize = 12;

/// How often something was at most so large.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [u64],
    /// One more than there are bounds, for what is above them all.
    counts: [AtomicU64; BOUNDS + 1],
    sum: AtomicU64,
}

impl Histogram {
    const fn new(bounds: &'static [u64]) -> Self {
        assert!(bounds.len() <= BOUNDS, "too many bounds");
        Self {
            bounds,
            counts: [const { AtomicU64::new(0) }; BOUNDS + 1],
            sum: AtomicU64::new(0),
        }
    }

    /// It was so large once more.
    pub fn observe(&self, value: u64) {
        self.counts[self.bounds.partition_point(|bound| *bound < value)]
            .fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }
}

const CHUNKS: &[u64] = &[
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
];

/// Connections to the port for members.
pub static CONNECTIONS: Level = Level::new();
/// Most of them that the port takes on.
pub static CONNECTIONS_LIMIT: Level = Level::new();
/// Connections that were turned away, because there were too many.
pub static CONNECTIONS_REFUSED: Counter = Counter::new();
/// Connections whose TLS handshake came to nothing.
pub static HANDSHAKES_FAILED: Counter = Counter::new();
/// Verified bytes that came over the network and were new.
pub static BYTES_RECEIVED: Counter = Counter::new();
/// Bytes that came over the network and were of no use.
pub static BYTES_WASTED: Counter = Counter::new();
/// Pieces that were verified and were new.
pub static PIECES_VERIFIED: Counter = Counter::new();
/// Pieces that another source had brought first.
pub static PIECES_WASTED: Counter = Counter::new();
/// Pieces, or other answers, that were wrong.
pub static PIECES_BAD: Counter = Counter::new();
/// Reports of wrong pieces that were heard, and true: the file was withdrawn.
pub static REPORTS_TRUE: Counter = Counter::new();
/// Reports of wrong pieces that were heard, and false.
pub static REPORTS_FALSE: Counter = Counter::new();
/// Reports of wrong pieces that were not heard, or nothing could be said about.
pub static REPORTS_IGNORED: Counter = Counter::new();
/// Times that a source was banned.
pub static BANS: Counter = Counter::new();
/// Gets that ended well.
pub static TRANSFERS_DONE: Counter = Counter::new();
/// Gets that failed.
pub static TRANSFERS_FAILED: Counter = Counter::new();
/// Gets that were given up by whoever wanted them.
pub static TRANSFERS_STOPPED: Counter = Counter::new();
/// Chunk lengths that others asked for, once a claim.
pub static CHUNKS_SENT: Histogram = Histogram::new(CHUNKS);
/// Chunk lengths that we asked for, once a claim.
pub static CHUNKS_RECEIVED: Histogram = Histogram::new(CHUNKS);
/// Times that a shared file could not be read.
pub static DISK_READ_ERRORS: Counter = Counter::new();
/// Times that a download could not be written, or what was written was lost.
pub static DISK_WRITE_ERRORS: Counter = Counter::new();
/// Times that a download found the disk full.
pub static DISK_FULL: Counter = Counter::new();
/// Leases that ended without a goodbye.
pub static LEASES_EXPIRED: Counter = Counter::new();
/// Certificates that the authority signed.
pub static CERTIFICATES_ISSUED: Counter = Counter::new();

/// The text, as it grows.
#[derive(Debug, Default)]
pub struct Exposition(String);

/// A metric of an [`Exposition`], to be followed by its values.
#[derive(Debug)]
pub struct Metric<'a> {
    page: &'a mut String,
    name: &'static str,
}

/// Names and values, all of them our own words.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

impl Exposition {
    /// The whole text.
    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }

    /// Something that only rises; its name ends in `_total`.
    pub fn counter(&mut self, name: &'static str, help: &str) -> Metric<'_> {
        self.metric(name, "counter", help)
    }

    /// Something that is so now.
    pub fn gauge(&mut self, name: &'static str, help: &str) -> Metric<'_> {
        self.metric(name, "gauge", help)
    }

    /// How large something was how often.
    pub fn histogram(&mut self, name: &'static str, help: &str) -> Metric<'_> {
        self.metric(name, "histogram", help)
    }

    fn metric(&mut self, name: &'static str, kind: &str, help: &str) -> Metric<'_> {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        Metric {
            page: &mut self.0,
            name,
        }
    }

    /// What tracker and peer have in common.
    pub fn process(&mut self, role: &str, is_ready: bool) {
        let version = env!("CARGO_PKG_VERSION");
        self.gauge("sprat_build_info", "Always 1; what runs here.")
            .with(&[("version", version), ("role", role)], 1);
        self.gauge(
            "sprat_start_time_seconds",
            "When this process began, in seconds since the epoch.",
        )
        .is(*BEGAN);
        self.gauge("sprat_ready", "1 if it does its work, as /readyz says.")
            .is(u8::from(is_ready));
        self.gauge("sprat_resident_memory_bytes", "Memory in use.")
            .is(resident_bytes());
        let n_open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        self.gauge("sprat_open_files", "Open descriptors.")
            .is(n_open);
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile)
            .current
            .unwrap_or(u64::MAX);
        self.gauge(
            "sprat_open_files_limit",
            "Most descriptors that may be open.",
        )
        .is(most);
        rpc::measure(self);
    }

    /// The port for members.
    pub fn connections(&mut self) {
        let [now, limit] =
            [&CONNECTIONS, &CONNECTIONS_LIMIT].map(|level| level.0.load(Ordering::Relaxed));
        self.gauge("sprat_connections", "Connections to the port for members.")
            .is(now);
        self.gauge(
            "sprat_connections_limit",
            "Most connections to the port for members.",
        )
        .is(limit);
        let mut refused = self.counter(
            "sprat_connections_refused_total",
            "Connections that came to nothing.",
        );
        refused.with(&[("reason", "too_many")], CONNECTIONS_REFUSED.get());
        refused.with(&[("reason", "handshake")], HANDSHAKES_FAILED.get());
    }

    /// Seconds until certificates end.
    pub fn certificates(&mut self, leaf: i64, authority: i64) {
        let help =
            "Until this process's own certificate, or its authority's, ends; negative afterwards.";
        let mut left = self.gauge("sprat_certificate_seconds_left", help);
        left.with(&[("certificate", "leaf")], leaf);
        left.with(&[("certificate", "authority")], authority);
    }
}

impl Metric<'_> {
    /// Its one value.
    pub fn is(&mut self, value: impl Display) {
        self.with(&[], value);
    }

    /// The count so far.
    pub fn counts(&mut self, labels: Labels<'_>, counter: &Counter) {
        self.with(labels, counter.get());
    }

    /// A value of several.
    pub fn with(&mut self, labels: Labels<'_>, value: impl Display) {
        self.line("", labels, value);
    }

    /// A histogram, whose values are `per` to the unit of the metric.
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    pub fn spread(&mut self, labels: Labels<'_>, histogram: &Histogram, per: f64) {
        let mut n = 0;
        for (i, count) in histogram
            .counts
            .iter()
            .take(histogram.bounds.len() + 1)
            .enumerate()
        {
            n += count.load(Ordering::Relaxed);
            let bound = histogram
                .bounds
                .get(i)
                .map_or_else(|| "+Inf".into(), |bound| (*bound as f64 / per).to_string());
            self.line("_bucket", &[labels, &[("le", &bound)]].concat(), n);
        }
        self.line(
            "_sum",
            labels,
            histogram.sum.load(Ordering::Relaxed) as f64 / per,
        );
        self.line("_count", labels, n);
    }

    fn line(&mut self, suffix: &str, labels: Labels<'_>, value: impl Display) {
        let labels: Vec<_> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{value}\""))
            .collect();
        let labels = if labels.is_empty() {
            String::new()
        } else {
            format!("{{{}}}", labels.join(","))
        };
        let _ = writeln!(self.page, "{}{suffix}{labels} {value}", self.name);
    }
}

static BEGAN: LazyLock<u64> = LazyLock::new(|| {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
});

/// Notes when this process began.
pub fn begin() {
    LazyLock::force(&BEGAN);
}

fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?
            .trim()
            .strip_suffix(" kB")?
            .parse()
            .ok()
    });
    kib.map_or(0, |kib: u64| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let chunks = Histogram::new(&[10, 20]);
        [5, 10, 11, 99]
            .iter()
            .for_each(|value| chunks.observe(*value));
        let mut page = Exposition::default();
        page.gauge("sprat_a", "So many.").is(3);
        page.counter("sprat_b_total", "So often.")
            .with(&[("x", "y"), ("z", "w")], 4);
        page.histogram("sprat_c_seconds", "So long.")
            .spread(&[("k", "v")], &chunks, 10.0);
        let expected = "# HELP sprat_a So many.\n# TYPE sprat_a gauge\nsprat_a 3\n\
                        # HELP sprat_b_total So often.\n# TYPE sprat_b_total counter\nsprat_b_total{x=\"y\",z=\"w\"} 4\n\
                        # HELP sprat_c_seconds So long.\n# TYPE sprat_c_seconds histogram\n\
                        sprat_c_seconds_bucket{k=\"v\",le=\"1\"} 2\nsprat_c_seconds_bucket{k=\"v\",le=\"2\"} 3\n\
                        sprat_c_seconds_bucket{k=\"v\",le=\"+Inf\"} 4\nsprat_c_seconds_sum{k=\"v\"} 12.5\n\
                        sprat_c_seconds_count{k=\"v\"} 4\n";
        assert_eq!(page.into_text(), expected);
    }

    #[test]
    fn a_level_falls_when_whoever_entered_leaves() {
        static HERE: Level = Level::new();
        let (first, second) = (HERE.enter(), HERE.enter());
        assert_eq!(HERE.0.load(Ordering::Relaxed), 2);
        drop((first, second));
        assert_eq!(HERE.0.load(Ordering::Relaxed), 0);
    }
}
