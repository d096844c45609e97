//! Where the time of a transfer went, and which stage held it up.
//!
//! Invariant: adding is one atomic operation. [`StageTimes::bottleneck`] is a pure function of the sums and the wall time.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// What takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The source read its disk.
    SourceDisk,
    /// The source held back: an upload limit.
    SourceLimit,
    /// The source waited for the network, or for us, to take more.
    SourceNetwork,
    /// Lanes were held back here: a download limit.
    Limit,
    /// Lanes waited here for bytes.
    Network,
    /// Decryption.
    Tls,
    /// Verification.
    Hashing,
    /// Writing and syncing.
    Disk,
    /// Lanes did not read on, because too many pieces were on their way to the disk.
    Full,
}

const STAGES: usize = Stage::Full as usize + 1;

/// Sums over a transfer, from all its lanes. Stages overlap, so together they may exceed the wall time.
#[derive(Debug, Default)]
pub struct StageTimes([AtomicU64; STAGES]);

/// What a transfer would be faster without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bottleneck {
    /// The source's disk.
    SourceDisk,
    /// The source's upload limit.
    SourceLimit,
    /// The network, or the source's CPU.
    Network,
    /// Decryption here, on one core per connection.
    Tls,
    /// Verification here.
    Hashing,
    /// The disk here.
    Disk,
    /// The download limit here.
    Limit,
}

impl fmt::Display for Bottleneck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SourceDisk => "source_disk",
            Self::SourceLimit => "source_limit",
            Self::Network => "network",
            Self::Tls => "tls",
            Self::Hashing => "hashing",
            Self::Disk => "disk",
            Self::Limit => "limit",
        })
    }
}

impl StageTimes {
    /// Adds to a stage.
    pub fn add(&self, stage: Stage, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.0[stage as usize].fetch_add(micros, Ordering::Relaxed);
    }

    /// What a stage has taken so far.
    #[must_use]
    pub fn on(&self, stage: Stage) -> Duration {
        Duration::from_micros(self.0[stage as usize].load(Ordering::Relaxed))
    }

    /// Which stage held the transfer up: the limit here if lanes were held back longest; else TLS if it kept a core busy
    /// for seven tenths of the wall time per connection; else, if lanes stood still for want of room longer than for want
    /// of bytes, the slower of hashing and disk here; else what the source waited for, where all that lanes waited and
    /// the source cannot account for was the network: it sees no more of that than what its buffers do not hold. `None`
    /// if nothing was measured.
    #[must_use]
    pub fn bottleneck(&self, wall: Duration, connections: u32) -> Option<Bottleneck> {
        let on = |stage| self.on(stage);
        if self.0.iter().all(|sum| sum.load(Ordering::Relaxed) == 0) {
            return None;
        }
        if on(Stage::Limit) > on(Stage::Network).max(on(Stage::Full)) {
            return Some(Bottleneck::Limit);
        }
        if !wall.is_zero() && on(Stage::Tls) * 10 >= wall * connections.max(1) * 7 {
            return Some(Bottleneck::Tls);
        }
        if on(Stage::Full) > on(Stage::Network) {
            let is_disk = on(Stage::Disk) >= on(Stage::Hashing);
            return Some(if is_disk {
                Bottleneck::Disk
            } else {
                Bottleneck::Hashing
            });
        }
        let unaccounted =
            on(Stage::Network).saturating_sub(on(Stage::SourceDisk) + on(Stage::SourceLimit));
        let most = [
            (on(Stage::SourceDisk), Bottleneck::SourceDisk),
            (on(Stage::SourceLimit), Bottleneck::SourceLimit),
            (
                on(Stage::SourceNetwork).max(unaccounted),
                Bottleneck::Network,
            ),
        ];
        most.into_iter()
            .max_by_key(|(time, _)| *time)
            .map(|(_, what)| what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(spent: &[(Stage, u64)]) -> Option<Bottleneck> {
        let sums = StageTimes::default();
        for (stage, millis) in spent {
            sums.add(*stage, Duration::from_millis(*millis));
        }
        sums.bottleneck(Duration::from_secs(10), 1)
    }

    #[test]
    fn the_stage_that_holds_a_transfer_up_is_named() {
        use Stage::{
            Disk, Full, Hashing, Limit, Network, SourceDisk, SourceLimit, SourceNetwork, Tls,
        };
        let idle = [(SourceNetwork, 9000), (Network, 15_000)];
        assert_eq!(named(&[]), None);
        assert_eq!(named(&idle), Some(Bottleneck::Network));
        assert_eq!(
            named(&[idle[0], idle[1], (Limit, 16_000)]),
            Some(Bottleneck::Limit)
        );
        assert_eq!(
            named(&[idle[0], idle[1], (Tls, 7000)]),
            Some(Bottleneck::Tls)
        );
        assert_eq!(
            named(&[(SourceDisk, 9000), (Network, 15_000)]),
            Some(Bottleneck::SourceDisk)
        );
        assert_eq!(
            named(&[(SourceDisk, 20), (SourceNetwork, 2), (Network, 4000)]),
            Some(Bottleneck::Network)
        );
        assert_eq!(
            named(&[(SourceLimit, 9000), (SourceDisk, 100), (Network, 100)]),
            Some(Bottleneck::SourceLimit)
        );
        assert_eq!(
            named(&[idle[0], (Full, 9000), (Disk, 12_000), (Hashing, 900)]),
            Some(Bottleneck::Disk)
        );
        assert_eq!(
            named(&[idle[0], (Full, 9000), (Disk, 900), (Hashing, 9000)]),
            Some(Bottleneck::Hashing)
        );
    }
}
