//! What adaptive sizes are worth: the same downloads with sizes that follow each source's speed, and with fixed ones.
//!
//! Tracker, sources, TLS and the download are the product, in one process over loopback; a link with a rate and a delay is
//! a relay of this file. Prints a Markdown table for chunk lengths and one for claim lengths: the median speed of each
//! setting, and the geometric mean over the settings.
//!
//! Invariant: a download that does not end with the shared file has no speed, and its column no mean; runs of different
//! sizes take turns, so that whatever else the machine does falls on all of them.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a table is what this program is for"
)]

use std::{
    fs::{self, File},
    io::Write,
    net::{SocketAddr, TcpListener as Probe},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Parser;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use sprat::{
    content::ContentId,
    peer::{
        Node, NodeOptions, Rates, ShareSpec,
        fetch::{
            destination::{Disk, Existing, Want},
            download::{Get, open_files},
            pace::Fixed,
            progress::Progress,
            swarm::Here,
        },
        limit::Limit,
        member::{join::join, membership::Membership, tracker_client::TrackerClient},
        sharing::{
            hasher::hash_file,
            index::Index,
            library::Library,
            shares::{Shares, SharesConfig},
        },
    },
    proto::ListFilesRequest,
    safe_path::{Root, SafeName},
    token::JoinToken,
    tracker::{Keep, Tracker, TrackerOptions},
    units::human_size,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::{Builder, Handle},
    sync::mpsc,
    time::{interval, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const LOOPBACK: &str = "127.0.0.1:0";
const NAME: &str = "payload";
const PATIENCE: Duration = Duration::from_secs(30);
const CHUNKS: [u32; 7] = [
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
];
const CLAIMS: [u64; 6] = [256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20];

/// Measures adaptive chunk and claim lengths against fixed ones.
#[derive(Parser)]
struct Options {
    /// Runs of each cell; the table has their median.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only the settings whose name contains this.
    #[arg(long, default_value = "")]
    setting: String,
    /// Only the table of this kind: chunks or claims.
    #[arg(long)]
    table: Option<String>,
    /// Where files lie meanwhile; memory, where there is such a place.
    #[arg(long, default_value = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" })]
    dir: PathBuf,
    /// Every run's speed, too.
    #[arg(long)]
    all: bool,
    /// What `cargo bench` says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A line between a source and the downloader.
#[derive(Clone, Copy)]
struct Line {
    bytes_per_second: f64,
    round_trip: Duration,
}

struct Setting {
    name: &'static str,
    /// Runs at most: a link that is much slower than the machine gives the same each time.
    runs: usize,
    size: u64,
    /// One source for each; none: loopback as it is.
    lines: &'static [Option<Line>],
}

const fn line(mb_per_second: f64, millis: u64) -> Option<Line> {
    Some(Line {
        bytes_per_second: mb_per_second * 1e6,
        round_trip: Duration::from_millis(millis),
    })
}

/// Over the trickle a chunk of 256 KiB takes 13 s, and 10 s without an answer are the end of a source.
const SETTINGS: [Setting; 4] = [
    Setting {
        name: "fast LAN",
        runs: usize::MAX,
        size: 512 << 20,
        lines: &[None],
    },
    Setting {
        name: "slow link",
        runs: usize::MAX,
        size: 4 << 20,
        lines: &[line(1.0, 50)],
    },
    Setting {
        name: "mixed",
        runs: usize::MAX,
        size: 256 << 20,
        lines: &[line(200.0, 1), line(2.0, 20)],
    },
    Setting {
        name: "trickle",
        runs: 1,
        size: 256 << 10,
        lines: &[line(0.02, 100)],
    },
];

fn main() -> Result<()> {
    // As the program does: the allocator then keeps what was freed.
    drop(std::hint::black_box(Vec::<u8>::with_capacity(16 << 20)));
    let options = Options::parse();
    // Lines have a thread of their own, so that they keep time while the product is busy.
    let lines = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let product = Builder::new_multi_thread().enable_all().build()?;
    let chunks = CHUNKS.map(|len| {
        (
            human_size(len.into()),
            Fixed {
                chunk_len: Some(len),
                ..Fixed::default()
            },
        )
    });
    let claims = CLAIMS.map(|len| {
        (
            human_size(len),
            Fixed {
                claim_bytes: Some(len),
                ..Fixed::default()
            },
        )
    });
    let wanted = |table: &str| options.table.as_ref().is_none_or(|only| only == table);
    if wanted("chunks") {
        println!(
            "Chunk length (claims adapt; a chunk ends with its piece, here after 256 KiB at the latest), MB/s:\n"
        );
        product.block_on(table(&options, &chunks, lines.handle()))?;
    }
    if wanted("claims") {
        println!("Claim length (chunks adapt), MB/s:\n");
        product.block_on(table(&options, &claims, lines.handle()))?;
    }
    Ok(())
}

/// Runs all settings and prints a table.
async fn table(options: &Options, fixed: &[(String, Fixed)], lines: &Handle) -> Result<()> {
    let adaptive = ("adaptive".to_owned(), Fixed::default());
    let columns: Vec<_> = [&adaptive].into_iter().chain(fixed).collect();
    let names: Vec<_> = columns.iter().map(|(name, _)| name.as_str()).collect();
    println!("| | {} | adaptive ÷ best fixed |", names.join(" | "));
    println!("|---{}|", "|--:".repeat(columns.len() + 1));
    let mut means = vec![1.0; columns.len()];
    let settings: Vec<_> = SETTINGS
        .iter()
        .filter(|setting| setting.name.contains(&options.setting))
        .collect();
    for setting in &settings {
        let stage = Stage::start(setting, options, lines).await?;
        // The first download of all opens what stays open.
        stage.download(Fixed::default(), 0).await?;
        let mut outcomes = vec![vec![]; columns.len()];
        for run in 0..options.runs.min(setting.runs) {
            for (i, (_, fixed)) in columns.iter().enumerate() {
                outcomes[i].push(stage.download(*fixed, 1 + run * columns.len() + i).await?);
            }
        }
        stage.stop().await;
        let speeds: Vec<_> = outcomes
            .iter()
            .map(|runs| median(runs.iter().map(|outcome| outcome.0)))
            .collect();
        means
            .iter_mut()
            .zip(&speeds)
            .for_each(|(mean, speed)| *mean *= speed);
        row(setting.name, &speeds);
        if setting.lines.len() == 1 && setting.lines[0].is_some() {
            let gaps: Vec<_> = outcomes
                .iter()
                .map(|runs| median(runs.iter().map(|outcome| outcome.1)))
                .collect();
            println!(
                "| {}: longest wait, ms | {} | |",
                setting.name,
                cells(&gaps)
            );
        }
        if options.all {
            for ((name, _), runs) in columns.iter().zip(&outcomes) {
                eprintln!(
                    "{} {name}: {}",
                    setting.name,
                    cells(&runs.iter().map(|run| run.0).collect::<Vec<_>>())
                );
            }
        }
    }
    row(
        "geometric mean",
        &means
            .iter()
            .map(|mean| mean.powf(1.0 / settings.len() as f64))
            .collect::<Vec<_>>(),
    );
    println!();
    Ok(())
}

fn row(name: &str, speeds: &[f64]) {
    let best = speeds[1..].iter().copied().fold(0.0, f64::max);
    println!("| {name} | {} | {:.3} |", cells(speeds), speeds[0] / best);
}

fn cells(numbers: &[f64]) -> String {
    let shown = |number: &f64| match *number {
        0.0 => "failed".into(),
        ..10.0 => format!("{number:.3}"),
        _ => format!("{number:.0}"),
    };
    numbers.iter().map(shown).collect::<Vec<_>>().join(" | ")
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<_> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// A network with one shared file, and who downloads it.
struct Stage {
    folder: tempfile::TempDir,
    tracker: Tracker,
    sources: Vec<Node>,
    membership: Arc<Membership>,
    client: Arc<TrackerClient>,
    want: Want,
}

impl Stage {
    async fn start(setting: &Setting, options: &Options, lines: &Handle) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("sprat-chunks-")
            .tempdir_in(&options.dir)?;
        let tracker = Tracker::start(TrackerOptions {
            state_dir: folder.path().join("tracker"),
            listen: LOOPBACK.parse()?,
            operator: None,
            advertise: vec![],
            own: None,
            leaf_life: Duration::from_secs(86_400),
            heartbeat: Duration::from_secs(5),
            lease: Duration::from_secs(15),
            memory_budget: 64 << 20,
            keep: Keep::default(),
        })
        .await?;
        let token: JoinToken = tracker.join_link(10, Duration::from_secs(600))?.parse()?;
        let (share, size) = (folder.path().join("share"), setting.size);
        let id = tokio::task::spawn_blocking(move || payload(&share, size)).await??;
        let mut sources = vec![];
        for (i, line) in setting.lines.iter().enumerate() {
            let state_dir = folder.path().join(format!("source-{i}"));
            join(&token, &state_dir).await?;
            sources.push(source(folder.path(), state_dir, *line, lines).await?);
        }
        let state = folder.path().join("sink");
        join(&token, &state).await?;
        let membership = Membership::load(&state, None)?;
        let client = Arc::new(TrackerClient::new(membership.clone()));
        let name = SafeName::from_path(Path::new(NAME))?;
        let want = Want {
            target: name.clone(),
            name,
            size,
            id,
        };
        let until = Instant::now() + PATIENCE;
        loop {
            let listing = client
                .list(ListFilesRequest {
                    content_id: id.to_string(),
                    ..Default::default()
                })
                .await?;
            if listing
                .rows
                .iter()
                .any(|row| row.source_count as usize == sources.len())
            {
                return Ok(Self {
                    folder,
                    tracker,
                    sources,
                    membership,
                    client,
                    want,
                });
            }
            ensure!(
                Instant::now() < until,
                "the sources did not list the file within {PATIENCE:?}"
            );
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// One download into a folder of its own: MB/s from the first word to the finished file, and the longest time in
    /// milliseconds without a new piece. No speed, if it failed.
    async fn download(&self, fixed: Fixed, run: usize) -> Result<(f64, f64)> {
        let run = self.folder.path().join(format!("run-{run}"));
        let folder = run.join("files");
        fs::create_dir_all(&folder)?;
        let (cancel, tasks, library) =
            (CancellationToken::new(), TaskTracker::new(), Library::new());
        let index = Arc::new(Index::open(&run.join("index.redb"))?);
        let shares = Arc::new(Shares::new(SharesConfig {
            index: index.clone(),
            library: library.clone(),
            hidden: vec![],
            rescan: Duration::from_secs(3600),
            poll: false,
            cancel: cancel.clone(),
            tasks: tasks.clone(),
        }));
        let root = Root::open(&folder)?;
        let ending = TaskTracker::new();
        ending.close();
        let get = Get {
            membership: self.membership.clone(),
            tracker: self.client.clone(),
            here: Here::default(),
            limit: Limit::new(Rates::default()),
            fixed,
            disk: Disk {
                root,
                index,
                library,
                shares,
                cancel: cancel.clone(),
            },
            wants: vec![self.want.clone()],
            holders: vec![],
            patience: None,
            open_files: open_files(),
            existing: Existing::Refuse,
            tasks: tasks.clone(),
            ending,
        };
        let progress = Arc::new(Progress::default());
        let (happenings, mut happened) = mpsc::channel(64);
        let mut running = std::pin::pin!(get.run(progress.clone(), happenings));
        let mut ticks = interval(Duration::from_millis(5));
        let began = Instant::now();
        let (mut had, mut since, mut longest) = (0, began, Duration::ZERO);
        let done = loop {
            tokio::select! {
                done = running.as_mut() => break done,
                Some(_) = happened.recv() => {}
                _ = ticks.tick() => {}
            }
            let has: u64 = progress.sources().values().map(|source| source.bytes).sum();
            if has > had {
                longest = longest.max(since.elapsed());
                (had, since) = (has, Instant::now());
            }
        };
        let took = began.elapsed();
        cancel.cancel();
        tasks.close();
        tasks.wait().await;
        let size = fs::metadata(folder.join(NAME)).map(|file| file.len());
        fs::remove_dir_all(&run)?;
        if let Err(error) = done {
            eprintln!("{error:#}");
            return Ok((0.0, f64::INFINITY));
        }
        let size = size?;
        ensure!(size == self.want.size, "the file has {size} bytes");
        Ok((
            size as f64 / 1e6 / took.as_secs_f64(),
            longest.as_secs_f64() * 1e3,
        ))
    }

    async fn stop(self) {
        for source in self.sources {
            source.stop().await;
        }
        self.tracker.stop().await;
    }
}

/// Makes the shared file.
fn payload(share: &Path, size: u64) -> Result<ContentId> {
    fs::create_dir(share)?;
    let path = share.join(NAME);
    let mut file = File::create_new(&path)?;
    let (mut random, mut buffer) = (SmallRng::seed_from_u64(7), vec![0; 1 << 20]);
    let mut left = size;
    while left > 0 {
        let n = usize::try_from(left)?.min(buffer.len());
        random.fill_bytes(&mut buffer[..n]);
        file.write_all(&buffer[..n])?;
        left -= n as u64;
    }
    Ok(hash_file(&File::open(&path)?, &CancellationToken::new())?
        .manifest
        .id())
}

async fn source(
    folder: &Path,
    state_dir: PathBuf,
    line: Option<Line>,
    lines: &Handle,
) -> Result<Node> {
    let listen = Probe::bind(LOOPBACK)?.local_addr()?;
    let advertise = match line {
        Some(line) => vec![lines.spawn(relay(listen, line)).await??.to_string()],
        None => vec![],
    };
    Node::start(NodeOptions {
        state_dir,
        shares: vec![ShareSpec {
            name: None,
            path: folder.join("share"),
        }],
        downloads: None,
        listen: Some(listen),
        operator: None,
        advertise,
        tracker: None,
        rescan: Duration::from_secs(3600),
        upload_limit: Rates::default(),
        download_limit: Rates::default(),
    })
    .await
}

/// A relay to `far` that behaves like `line`, on any port, for as long as its runtime lives.
async fn relay(far: SocketAddr, line: Line) -> Result<SocketAddr> {
    let listener = TcpListener::bind(LOOPBACK).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        let clock = Arc::new(Mutex::new(Instant::now()));
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(connect(near, far, line, clock.clone()));
        }
    });
    Ok(address)
}

/// Relays a connection; its bytes to `near` share the line's rate with all others.
async fn connect(
    near: TcpStream,
    far: SocketAddr,
    line: Line,
    clock: Arc<Mutex<Instant>>,
) -> Result<()> {
    let socket = TcpSocket::new_v4()?;
    // What a slow line does not take stays with the sender, not in a buffer between.
    socket.set_recv_buffer_size(if line.bytes_per_second < 1e7 {
        64 << 10
    } else {
        4 << 20
    })?;
    let far = socket.connect(far).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::select! {
        () = carry(near_in, far_out, line, None) => {}
        () = carry(far_in, near_out, line, Some(clock)) => {}
    }
    Ok(())
}

/// The timer rounds up to its next tick, also what is over already.
async fn until(at: Instant) {
    if at > Instant::now() {
        sleep_until(at.into()).await;
    }
}

/// How far a line makes good what the timer was late.
const SLACK: Duration = Duration::from_millis(4);

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    line: Line,
    clock: Option<Arc<Mutex<Instant>>>,
) {
    // Long enough for what is on its way, in blocks of at most 64 KiB.
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(1024);
    let read = async move {
        loop {
            let mut block = vec![
                0;
                if line.bytes_per_second < 1e7 {
                    4 << 10
                } else {
                    64 << 10
                }
            ];
            let Ok(n @ 1..) = from.read(&mut block).await else {
                return;
            };
            block.truncate(n);
            let mut leaves = Instant::now();
            if let Some(clock) = &clock {
                let mut clock = clock.lock().expect("no panic while the lock is held");
                let earliest = leaves.checked_sub(SLACK).unwrap_or(leaves);
                *clock = (*clock).max(earliest)
                    + Duration::from_secs_f64(n as f64 / line.bytes_per_second);
                leaves = leaves.max(*clock);
            }
            until(leaves).await;
            if sender
                .send((leaves + line.round_trip / 2, block))
                .await
                .is_err()
            {
                return;
            }
        }
    };
    let write = async move {
        while let Some((arrives, block)) = receiver.recv().await {
            until(arrives).await;
            if to.write_all(&block).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}
