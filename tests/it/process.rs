//! Processes and what they say.
//!
//! Invariant: a process that was started here is dead when its [`Process`] is gone; what it said is in two files, so that
//! nobody waits for a full pipe.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, PipeReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longer than any command here should take, on a slow and busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Asks again and again until there is an answer; the only place where a test waits.
pub fn wait_until<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + within;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "not within {within:?}: {what}");
        thread::park_timeout(Duration::from_millis(15));
    }
}

/// A started program.
pub struct Process {
    child: Child,
    what: String,
    stdout: PathBuf,
    stderr: PathBuf,
    /// Its output that nobody reads yet.
    unread: Option<PipeReader>,
    reader: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts `command`; its output goes to files in `folder`, its standard input is empty unless the caller set `stdin`.
    pub fn spawn(command: &mut Command, folder: &Path, stdin: Option<Stdio>) -> Self {
        let (stdout, stderr) = Self::files(folder);
        command.stdin(stdin.unwrap_or_else(Stdio::null));
        command
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap());
        Self::begin(command, (stdout, stderr), None)
    }

    /// Starts `command`, whose output nobody reads before [`Self::read_on`].
    pub fn spawn_unread(mut command: Command, folder: &Path) -> Self {
        let (stdout, stderr) = Self::files(folder);
        let (reader, writer) = io::pipe().unwrap();
        command.stdin(Stdio::null()).stdout(writer);
        command.stderr(File::create(&stderr).unwrap());
        File::create(&stdout).unwrap();
        Self::begin(&mut command, (stdout, stderr), Some(reader))
    }

    fn files(folder: &Path) -> (PathBuf, PathBuf) {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let file = folder.join(COUNT.fetch_add(1, Ordering::Relaxed).to_string());
        (file.with_extension("out"), file.with_extension("err"))
    }

    fn begin(
        command: &mut Command,
        (stdout, stderr): (PathBuf, PathBuf),
        unread: Option<PipeReader>,
    ) -> Self {
        let args = command.get_args().map(|arg| arg.to_string_lossy());
        let what = args.collect::<Vec<_>>().join(" ");
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{:?}: {error}", command.get_program()));
        Self {
            child,
            what,
            stdout,
            stderr,
            unread,
            reader: None,
        }
    }

    /// Reads what it said, and says from now on.
    pub fn read_on(&mut self) {
        let mut from = self.unread.take().unwrap();
        let mut to = File::create(&self.stdout).unwrap();
        self.reader = Some(thread::spawn(move || _ = io::copy(&mut from, &mut to)));
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stdout).unwrap()).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stderr).unwrap()).into_owned()
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The most memory that it ever had, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() << 10
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub fn finish(mut self, within: Duration) -> Outcome {
        let what = format!("`sprat {}` ends\n{}", self.what, self.said());
        let end = wait_until(&what, within, || self.child.try_wait().unwrap());
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        Outcome {
            what: self.what.clone(),
            code: end.code(),
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }

    /// Everything it said so far, for a person.
    pub fn said(&self) -> String {
        format!(
            "--- sprat {}\n{}{}",
            self.what,
            self.stdout(),
            self.stderr()
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    /// The arguments.
    #[expect(dead_code, reason = "read by Debug, when a test fails")]
    pub what: String,
    /// None: by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Demands success.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// Demands this exit code, and one clear line as the last word on stderr; `words` are said there.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        let last = self
            .stderr
            .trim_end()
            .lines()
            .next_back()
            .unwrap_or_default();
        // Wrong flags are explained at more length.
        assert!(
            (last.starts_with("sprat: ") || code == 2) && !self.stderr.contains("panicked"),
            "{self:#?}"
        );
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {self:#?}");
        }
        self
    }

    /// The JSON objects of stdout, a line each.
    #[track_caller]
    pub fn json(&self) -> Vec<Value> {
        let read = |line| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}\n{self:#?}"))
        };
        self.stdout.lines().map(read).collect()
    }

    /// The files that could not be had, each with its reason, as `get --json` names them.
    #[track_caller]
    pub fn failed_files(&self) -> BTreeMap<String, String> {
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let events = self.json().into_iter();
        events
            .filter(|event| event["event"] == "file_failed")
            .map(|event| {
                let (id, text) = (word(&event["content_id"]), word(&event["text"]));
                assert!(id.len() == 64 && !text.is_empty(), "{event}");
                (word(&event["name"]), word(&event["reason"]))
            })
            .collect()
    }

    /// Demands that a `get --json` could not have these files, each for one of these reasons, and that it had others.
    #[track_caller]
    pub fn partly(self, failed: &[(&str, &[&str])]) -> Self {
        assert_eq!(self.code, Some(12), "{self:#?}");
        let told = self.failed_files();
        assert!(
            told.keys().eq(failed.iter().map(|(name, _)| name)),
            "{told:?}: {self:#?}"
        );
        for (name, reasons) in failed {
            assert!(reasons.contains(&&*told[*name]), "{name}: {told:?}");
        }
        let last = self.json().pop().unwrap_or_default();
        let n_failed = [&last, &last["so_far"]].map(|last| last["files_failed"].as_u64());
        assert!(n_failed.contains(&Some(failed.len() as u64)), "{last}");
        self
    }

    /// The summary that ends `get --json`.
    #[track_caller]
    pub fn summary(&self) -> Value {
        let last = self.json().pop().unwrap_or_default();
        assert_eq!(last["event"], "done", "{self:#?}");
        last
    }
}
