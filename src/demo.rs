//! `sprat demo`: a whole network on this machine, in a folder that goes away, with one source killed and another that
//! lies; what happens is the product's own doing.
//!
//! Invariant: tracker, honest peers and downloader are the product unchanged. Only the liar is the demo's own: a small
//! ChunkService with a properly joined identity.

mod liar;

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use self::liar::Liar;
use crate::{
    cli::{DemoOptions, progress::ProgressReport},
    client::ControlClient,
    content::ContentId,
    peer::{
        self, Node, NodeOptions, Rates,
        member::{join::join, tracker_client::TrackerClient},
        sharing::hasher::hash_file,
    },
    proto::{
        Done, GetRequest, LimitRequest, ListFilesRequest, Wanted, get_event::Event,
        get_request::Existing,
    },
    safe_path,
    tracker::{Keep, Tracker, TrackerOptions},
    units::human_size,
};

const FILE: &str = "demo.bin";
const PATIENCE: Duration = Duration::from_secs(60);
const LOOPBACK: &str = "127.0.0.1:0";

/// Everything on disk and every process of the demo; gone when dropped.
struct Stage {
    folder: PathBuf,
    children: Vec<(String, Child)>,
}

impl Stage {
    fn new() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!(
            "sprat-demo-{}-{:08x}",
            std::process::id(),
            rand::random::<u32>()
        ));
        safe_path::private_dir(&folder)
            .with_context(|| format!("creating {}", folder.display()))?;
        Ok(Self {
            folder,
            children: vec![],
        })
    }

    fn state(&self, peer: &str) -> PathBuf {
        self.folder.join(peer).join("state")
    }

    fn share(&self, peer: &str) -> PathBuf {
        self.folder.join(peer).join("files")
    }

    /// Starts `sprat peer` as a process of its own.
    fn start_peer(&mut self, peer: &str) -> Result<()> {
        let log = File::create(self.folder.join(peer).join("log"))?;
        let child = Command::new(std::env::current_exe()?)
            .args([
                "peer",
                "--listen",
                LOOPBACK,
                "--operator",
                "none",
                "--state-dir",
            ])
            .arg(self.state(peer))
            .arg("--share")
            .arg(self.share(peer))
            .current_dir(&self.folder)
            .env_clear()
            .env("HOME", &self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting peer {peer}"))?;
        self.children.push((peer.to_owned(), child));
        Ok(())
    }

    fn kill(&mut self, peer: &str) -> Result<()> {
        for (_, child) in self.children.iter_mut().filter(|(name, _)| name == peer) {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for (_, child) in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Runs the demo.
///
/// # Errors
/// If anything at all is not as promised.
pub async fn run(options: DemoOptions) -> Result<()> {
    let size = options.size;
    let mut stage = Stage::new()?;
    let stopped = tokio::select! {
        outcome = play(&mut stage, size) => return outcome,
        stopped = tokio::signal::ctrl_c() => stopped,
    };
    stopped?;
    drop(stage);
    anyhow::bail!("stopped; everything was cleaned up")
}

fn say(line: impl AsRef<str>) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{}", line.as_ref())?)
}

async fn play(stage: &mut Stage, size: u64) -> Result<()> {
    say("A tracker and four peers on this machine, in a folder that goes away.\n")?;
    let tracker = Tracker::start(TrackerOptions {
        state_dir: stage.folder.join("tracker"),
        listen: LOOPBACK.parse()?,
        operator: None,
        advertise: vec![],
        own: None,
        leaf_life: Duration::from_secs(3600),
        heartbeat: Duration::from_secs(2),
        lease: Duration::from_secs(6),
        memory_budget: 64 << 20,
        keep: Keep::default(),
    })
    .await?;
    say(format!(
        "tracker   {}, authority {}…",
        tracker.address(),
        &tracker.fingerprint()[..16]
    ))?;
    let link = tracker.join_link(4, Duration::from_secs(600))?;
    let token = link.parse()?;
    let mut ids = vec![];
    for peer in ["ant", "bee", "fox", "owl"] {
        ids.push((
            join(&token, &stage.state(peer)).await?.peer_id.to_string(),
            peer,
        ));
    }
    say("joined    ant, bee, fox and owl, by one link good for four")?;
    let id = share(stage, size).await?;
    say(format!(
        "shared    {FILE}, {} by ant, bee and fox; content id {id:.16}…",
        human_size(size)
    ))?;
    let liar = Liar::start(
        &stage.state("fox"),
        &stage.share("fox").join(FILE),
        size / 8,
    )
    .await?;
    stage.start_peer("ant")?;
    stage.start_peer("bee")?;
    let owl = Node::start(NodeOptions {
        state_dir: stage.state("owl"),
        shares: vec![],
        downloads: Some(stage.share("owl")),
        listen: Some(LOOPBACK.parse()?),
        operator: None,
        advertise: vec![],
        tracker: None,
        rescan: Duration::from_secs(60),
        upload_limit: Rates::default(),
        // Until bee is killed, so that there is a half-way to see on any machine.
        download_limit: Rates {
            total: Some(size / 2),
            per_peer: None,
        },
    })
    .await?;
    wait_for_sources(&stage.state("owl"), id).await?;
    say(
        "download  owl, from all three at once, held back; half-way bee is killed, fox begins to lie, and owl is let go\n",
    )?;
    let (done, rate) = download(stage, &owl, id, size).await?;
    verify(stage, &liar, id, &ids, &done)?;
    say(format!(
        "speed     {}/s when it was let go, encrypted, every piece verified",
        human_size(rate)
    ))?;
    say(format!("equal     b3sum {id}"))?;
    liar.stop().await;
    owl.stop().await;
    tracker.stop().await;
    commands(&link)
}

/// Makes the file and puts it into three folders.
async fn share(stage: &Stage, size: u64) -> Result<ContentId> {
    let shares = ["ant", "bee", "fox"].map(|peer| stage.share(peer));
    tokio::task::spawn_blocking(move || {
        for share in &shares {
            fs::create_dir_all(share)?;
        }
        let path = shares[0].join(FILE);
        let mut file = File::create(&path)?;
        let mut random = SmallRng::seed_from_u64(rand::random());
        let mut buffer = vec![0; 1 << 20];
        let mut left = size;
        while left > 0 {
            random.fill_bytes(&mut buffer);
            let n = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            file.write_all(&buffer[..n])
                .with_context(|| format!("writing {}", path.display()))?;
            left -= n as u64;
        }
        drop(file);
        // One file under three names: the disk is not what is shown here.
        for share in &shares[1..] {
            fs::hard_link(&path, share.join(FILE))?;
        }
        Ok(hash_file(&File::open(&path)?, &CancellationToken::new())?
            .manifest
            .id())
    })
    .await?
}

async fn wait_for_sources(state: &Path, id: ContentId) -> Result<()> {
    let tracker = TrackerClient::open(state, None).await?;
    let until = Instant::now() + PATIENCE;
    loop {
        let rows = tracker
            .list(ListFilesRequest {
                content_id: id.to_string(),
                ..Default::default()
            })
            .await?
            .rows;
        if rows.iter().any(|row| row.source_count == 3) {
            return Ok(());
        }
        ensure!(
            Instant::now() < until,
            "the peers did not list the file within {PATIENCE:?}"
        );
        sleep(Duration::from_millis(50)).await;
    }
}

/// Gives the summary, and bytes a second without the limit.
async fn download(stage: &mut Stage, owl: &Node, id: ContentId, size: u64) -> Result<(Done, u64)> {
    let wanted = vec![Wanted {
        name: FILE.into(),
        size,
        content_id: id.to_string(),
        sources: vec![],
    }];
    let output = format!("{}/", stage.share("owl").display());
    let request = GetRequest {
        wanted,
        output,
        existing: Existing::Refuse.into(),
        ..GetRequest::default()
    };
    let mut control = ControlClient::new(owl.control());
    let mut events = control.get(request).await?;
    let mut report = ProgressReport::new(false, false, false);
    let mut let_go = None;
    loop {
        let event = events.next().await?;
        match &event {
            Event::Progress(progress) if let_go.is_none() && progress.bytes_done * 2 >= size => {
                stage.kill("bee")?;
                control
                    .limit(LimitRequest {
                        download: Some(0),
                        ..LimitRequest::default()
                    })
                    .await?;
                let_go = Some((Instant::now(), progress.bytes_done));
            }
            Event::Done(done) => {
                let (at, before) =
                    let_go.context("the download was over before bee could be killed")?;
                let millis = u64::try_from(at.elapsed().as_millis())?.max(1);
                let rate = done.bytes_fetched.saturating_sub(before) * 1000 / millis;
                let done = done.clone();
                report.event(&event)?;
                return Ok((done, rate));
            }
            Event::Failed(failed) => anyhow::bail!("the download failed: {}", failed.message),
            _ => {}
        }
        // The path of a file that is about to go away helps nobody.
        if !matches!(event, Event::FileDone(_)) {
            report.event(&event)?;
        }
    }
}

fn verify(
    stage: &Stage,
    liar: &Liar,
    id: ContentId,
    ids: &[(String, &str)],
    done: &Done,
) -> Result<()> {
    let received = hash_file(
        &File::open(stage.share("owl").join(FILE))?,
        &CancellationToken::new(),
    )?
    .manifest
    .id();
    ensure!(received == id, "the received file differs: {received}");
    say("\nfrom      source  bytes")?;
    for source in &done.sources {
        let name = ids
            .iter()
            .find(|(peer, _)| *peer == source.peer_id)
            .map_or("?", |(_, name)| *name);
        let how = match name {
            "bee" => "killed half-way",
            "fox" => "lied, and was banned",
            _ => "",
        };
        say(format!(
            "          {name:6}  {:>10}  {how}",
            human_size(source.bytes)
        ))?;
    }
    let gave = |name: &str| {
        done.sources
            .iter()
            .any(|s| s.bytes > 0 && ids.iter().any(|(id, n)| *id == s.peer_id && *n == name))
    };
    ensure!(
        ["ant", "bee", "fox"].into_iter().all(gave),
        "a source gave nothing"
    );
    ensure!(liar.lies() > 0, "fox never came to lie");
    let lost = "survived  a killed source, and a liar that was banned at its first wrong piece; nothing wrong reached the disk";
    say(lost)
}

fn commands(link: &str) -> Result<()> {
    let link = link.split_once('.').map_or(link, |(head, _)| head);
    say("\nThe same on your machines:\n")?;
    say("  sprat tracker run                      # once; prints a join link")?;
    say(format!("  sprat join {}…", &link[..link.len().min(40)]))?;
    say(format!(
        "  sprat peer --share DIR --downloads DIR  # listens on port {} or the next free one",
        peer::DEFAULT_PORT
    ))?;
    say("  sprat ls")?;
    say(format!("  sprat get {FILE} -o ."))
}
