//! A shared file changes unseen, as a page of a mapped file does. The peer that shares it learns of it from whoever was
//! sent the wrong piece, and from nobody else.

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    process::{Command, Stdio},
};

use bytes::Bytes;
use sprat::proto::{ReportPieceRequest, chunk_service_client::ChunkServiceClient};
use tempfile::TempDir;

use crate::{
    metrics::metrics,
    process::{Outcome, PATIENCE, Process, wait_until},
    swarm::{Swarm, skip},
    visitor::{Badge, connect},
};

const SIZE: u64 = 700_000;
/// A byte of the fourth piece.
const AT: u64 = 200_000;

/// Maps a file, makes the page dirty, and changes a byte of it when it is told to. The file's times change with the first
/// write only, until the page is clean, which it never is on a file system in memory. It looks old, so that nobody hashes it
/// twice.
const WRITER: &str = "
import mmap, os, sys
at = int(sys.argv[2])
with open(sys.argv[1], 'r+b') as file, mmap.mmap(file.fileno(), 0) as page:
    page[at] = page[at]
    os.utime(sys.argv[1], (1, 1))
    print('mapped', flush=True)
    if sys.stdin.readline():
        page[at] ^= 1
";

/// A peer `a` that shares a film which somebody has mapped.
struct Story {
    swarm: Swarm,
    shared: TempDir,
    writer: Process,
    id: String,
    peer: String,
}

impl Story {
    fn begin() -> Option<Self> {
        let shared = tempfile::Builder::new()
            .prefix("sprat-it-")
            .tempdir_in("/dev/shm")
            .ok()?;
        let mut swarm = Swarm::start();
        swarm.write("film", SIZE, "film");
        let film = shared.path().join("film");
        fs::copy(swarm.path("film"), &film).unwrap();
        let mut python = Command::new("python3");
        python.args(["-c", WRITER]).arg(&film).arg(AT.to_string());
        let mut writer = swarm.spawn_command(&mut python, Some(Stdio::piped()));
        wait_until("the page is mapped", PATIENCE, || {
            (!writer.stdout().is_empty() || !writer.is_running()).then_some(())
        });
        if !writer.is_running() {
            return None;
        }
        swarm.join("a");
        let folder = shared.path().to_str().unwrap().to_owned();
        swarm.start_peer("a", &["--share", &folder]);
        let status = swarm.wait_status("a", "shares the film", |status| {
            status["files"] == 1 && status["files_to_hash"] == 0
        });
        let peer = status["addresses"][0].as_str().unwrap().to_owned();
        for member in ["sink", "other"] {
            swarm.join(member);
        }
        let row = swarm.wait_listed("sink", "film", 1);
        let id = row["content_id"].as_str().unwrap().to_owned();
        Some(Self {
            swarm,
            shared,
            writer,
            id,
            peer,
        })
    }

    /// Changes a byte of the mapped page.
    fn change_unseen(&mut self) {
        let film = self.shared.path().join("film");
        let before = fs::metadata(&film).unwrap();
        let writer = self.writer.child();
        writer.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(writer.wait().unwrap().success());
        let after = fs::metadata(&film).unwrap();
        let times = |m: &fs::Metadata| (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
        assert_eq!(times(&before), times(&after), "it can be seen");
    }

    fn get(&self, member: &str) -> Outcome {
        self.swarm.run(member, ["get", "film", "-o", "got/"])
    }

    /// Reports a piece to `a` so many times.
    fn report(&self, member: &str, piece: u32, times: u32) {
        let content_id = Bytes::from(hex(&self.id));
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let badge = Badge::of_peer(&self.swarm.path(member));
            let connection = connect(&self.peer, Some(&badge), None).await.unwrap();
            let origin = connection.origin();
            let mut client = ChunkServiceClient::with_origin(connection, origin);
            for _ in 0..times {
                let content_id = content_id.clone();
                let request = ReportPieceRequest { content_id, piece };
                client.report_piece(request).await.unwrap();
            }
        });
    }

    #[track_caller]
    fn assert_counted(&self, expected: [(&str, f64); 3]) {
        let counted = metrics(&self.swarm, "a");
        for (outcome, n) in expected {
            let name = format!("sprat_piece_reports_total{{outcome=\"{outcome}\"}}");
            assert_eq!(counted[&name], n, "{outcome}");
        }
    }
}

fn hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn a_file_that_changed_unseen_is_withdrawn_when_a_receiver_tells() {
    let Some(mut story) = Story::begin() else {
        return skip("a file that changes unseen: needs python3 and /dev/shm");
    };
    story.change_unseen();
    story.get("sink").fails(6, &["film"]);
    let new = blake3::hash(&fs::read(story.shared.path().join("film")).unwrap());
    let new = new.to_hex().to_string();
    story.swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() == 1 && rows[0]["content_id"] == new.as_str()).then_some(())
    });
    story.get("sink").ok();
    story.assert_counted([("true", 1.0), ("false", 0.0), ("ignored", 0.0)]);
    let said = story.swarm.running("a").said();
    let told: Vec<_> = said
        .lines()
        .filter(|line| line.contains("changed unseen"))
        .collect();
    assert!(
        matches!(told[..], [line] if line.contains("WARN")
            && line.contains("film") && line.contains(story.shared.path().to_str().unwrap())),
        "{said}"
    );
    // Not even a restart believes the old hash again.
    story.swarm.kill("a");
    let folder = story.shared.path().to_str().unwrap().to_owned();
    story.swarm.start_peer("a", &["--share", &folder]);
    story.swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() == 1 && rows[0]["content_id"] == new.as_str()).then_some(())
    });
}

#[test]
fn false_reports_cost_one_hash_and_those_of_others_none() {
    let Some(story) = Story::begin() else {
        return skip("false reports: needs python3 and /dev/shm");
    };
    story.report("other", 3, 3);
    story.assert_counted([("true", 0.0), ("false", 0.0), ("ignored", 3.0)]);
    story.get("sink").ok();
    story.report("sink", 3, 20);
    story.assert_counted([("true", 0.0), ("false", 1.0), ("ignored", 22.0)]);
    let file = story.swarm.wait_listed("sink", "film", 1);
    assert_eq!(file["content_id"], story.id.as_str());
}
