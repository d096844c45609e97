//! A swarm of real processes in a folder of its own. A member is known by a short name, which is also the name of its
//! state directory; all paths that a test hands to a command are relative to the swarm's folder.
//!
//! Invariant: when a [`Swarm`] is gone, none of its processes is alive. A test that fails shows what they said.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{Outcome, PATIENCE, Process, wait_until};

const SPRAT: &str = env!("CARGO_BIN_EXE_sprat");
pub const TRACKER: &str = "tracker";
pub const MIB: u64 = 1 << 20;

/// Says that a test could not run, past the test runner's capture.
pub fn skip(reason: &str) {
    let _ = writeln!(io::stderr(), "SKIPPED: {reason}");
}

/// A port that nobody listens on, and that nobody is given meanwhile: not one of those that the kernel takes for outgoing
/// connections and for listeners who do not mind, and each only once.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = u16::try_from(std::process::id() % 10).unwrap() * 1_000;
    loop {
        let port = 20_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A tracker and its peers.
pub struct Swarm {
    folder: TempDir,
    environment: BTreeMap<String, String>,
    /// Words before the command of a member, such as `ip netns exec NAME`.
    wrappers: BTreeMap<String, Vec<String>>,
    running: BTreeMap<String, Process>,
    /// `HOST:PORT` of the operator page of each.
    operators: BTreeMap<String, String>,
    address: String,
}

impl Swarm {
    /// A folder, and nothing running yet.
    pub fn empty() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("sprat-it-")
            .tempdir()
            .unwrap();
        Self {
            folder,
            environment: BTreeMap::new(),
            wrappers: BTreeMap::new(),
            running: BTreeMap::new(),
            operators: BTreeMap::new(),
            address: String::new(),
        }
    }

    /// A running tracker.
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// A running tracker; these variables are in the environment of every process.
    pub fn with(variables: &[(&str, &str)]) -> Self {
        let mut swarm = Self::empty();
        variables
            .iter()
            .for_each(|(name, value)| swarm.set(name, value));
        swarm.start_tracker(&["--listen", "127.0.0.1:0"]);
        swarm
    }

    /// Sets a variable for every process from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.insert(name.into(), value.into());
    }

    /// Runs the commands of a member behind these words.
    pub fn wrap(&mut self, member: &str, words: &[&str]) {
        self.wrappers.insert(
            member.into(),
            words.iter().map(ToString::to_string).collect(),
        );
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `HOST:PORT` of the tracker.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// `sprat --state-dir MEMBER ARGS`, clean of the settings of whoever runs the test.
    pub fn command<A: AsRef<OsStr>>(
        &self,
        member: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut words: Vec<OsString> = Vec::new();
        words.extend(
            self.wrappers
                .get(member)
                .into_iter()
                .flatten()
                .map(OsString::from),
        );
        words.push(SPRAT.into());
        if !member.is_empty() {
            words.extend(["--state-dir".into(), self.path(member).into()]);
        }
        words.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .current_dir(self.folder.path())
            .env("HOME", self.folder.path());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("SPRAT_")
                || name.to_string_lossy().starts_with("XDG_")
            {
                command.env_remove(name);
            }
        }
        // Side by side, tests would fight for the default ports.
        command.envs([
            ("SPRAT_TRACKER_OPERATOR", "127.0.0.1:0"),
            ("SPRAT_PEER_OPERATOR", "127.0.0.1:0"),
        ]);
        command.envs(&self.environment);
        command
    }

    /// Starts a command of a member; an empty name means no state directory.
    pub fn spawn<A: AsRef<OsStr>>(
        &self,
        member: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Process {
        self.spawn_command(&mut self.command(member, args), None)
    }

    pub fn spawn_command(&self, command: &mut Command, stdin: Option<Stdio>) -> Process {
        Process::spawn(command, &self.logs(), stdin)
    }

    /// Starts a command of a member whose output nobody reads before [`Process::read_on`].
    pub fn spawn_unread<A: AsRef<OsStr>>(
        &self,
        member: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Process {
        Process::spawn_unread(self.command(member, args), &self.logs())
    }

    fn logs(&self) -> PathBuf {
        let logs = self.path(".output");
        fs::create_dir_all(&logs).unwrap();
        logs
    }

    /// Runs a command of a member to its end.
    pub fn run<A: AsRef<OsStr>>(&self, member: &str, args: impl IntoIterator<Item = A>) -> Outcome {
        self.spawn(member, args).finish(PATIENCE)
    }

    /// Starts the tracker and waits until it listens.
    pub fn start_tracker(&mut self, flags: &[&str]) {
        let mut process = self.spawn(TRACKER, [&["tracker", "run", "--json"], flags].concat());
        let started = first_line(&mut process);
        self.address = started["advertised"][0].as_str().unwrap().to_owned();
        self.keep(TRACKER, process, &started);
    }

    /// A link for `uses` machines.
    pub fn link(&self, uses: u32) -> String {
        let made = self.run(
            TRACKER,
            [
                "tracker",
                "token",
                "create",
                "--ttl",
                "1h",
                "--uses",
                &uses.to_string(),
            ],
        );
        made.ok().stdout.trim_end().to_owned()
    }

    /// Lets a member join and gives its peer id.
    pub fn join(&self, member: &str) -> String {
        let joined = self
            .run(member, ["join", &self.link(1), "--json"])
            .ok()
            .json()
            .remove(0);
        joined["peer_id"].as_str().unwrap().to_owned()
    }

    /// Starts a peer that has joined, and waits until the tracker knows it; gives its peer id.
    pub fn start_peer(&mut self, member: &str, flags: &[&str]) -> String {
        let peer_id = self.start_alone(member, flags);
        self.wait_status(member, "is online", |status| {
            status["tracker_state"] == "online"
        });
        peer_id
    }

    /// Starts a peer that has joined, whether or not there is a tracker; gives its peer id.
    pub fn start_alone(&mut self, member: &str, flags: &[&str]) -> String {
        let listen: &[&str] = if flags.contains(&"--listen") {
            &[]
        } else {
            &["--listen", "127.0.0.1:0"]
        };
        let mut process = self.spawn(member, [&["peer", "--json"], listen, flags].concat());
        let started = first_line(&mut process);
        self.keep(member, process, &started);
        started["peer_id"].as_str().unwrap().to_owned()
    }

    fn keep(&mut self, member: &str, process: Process, started: &Value) {
        self.operators.extend(
            started["operator"]
                .as_str()
                .map(|page| (member.to_owned(), page.to_owned())),
        );
        self.running.insert(member.into(), process);
    }

    /// `HOST:PORT` of a member's operator page.
    pub fn operator(&self, member: &str) -> &str {
        self.operators
            .get(member)
            .unwrap_or_else(|| panic!("{member} has no operator page"))
    }

    /// Joins and starts a peer that shares the folder `MEMBER-files`; gives its peer id.
    pub fn sharing_peer(&mut self, member: &str, flags: &[&str]) -> String {
        let folder = format!("{member}-files");
        fs::create_dir_all(self.path(&folder)).unwrap();
        if !self.path(member).exists() {
            self.join(member);
        }
        self.start_peer(member, &[&["--share", &folder], flags].concat())
    }

    /// The running process of a member.
    pub fn running(&mut self, member: &str) -> &mut Process {
        self.running
            .get_mut(member)
            .unwrap_or_else(|| panic!("{member} was not started"))
    }

    /// Takes the process of a member out, to watch its end.
    pub fn take(&mut self, member: &str) -> Process {
        self.running
            .remove(member)
            .unwrap_or_else(|| panic!("{member} was not started"))
    }

    /// Ends a member as a power cut would.
    pub fn kill(&mut self, member: &str) {
        self.take(member).kill();
    }

    /// Waits until `status --json` of a member is as wanted.
    pub fn wait_status(
        &self,
        member: &str,
        what: &str,
        mut wanted: impl FnMut(&Value) -> bool,
    ) -> Value {
        let what = format!("{member} {what}");
        wait_until(&what, PATIENCE, || {
            let asked = self.run(member, ["status", "--json"]);
            let status = serde_json::from_str(asked.stdout.lines().next()?).ok()?;
            wanted(&status).then_some(status)
        })
    }

    /// The rows of `ls --json` as a member sees them.
    pub fn ls(&self, member: &str) -> Vec<Value> {
        self.run(member, ["ls", "--json"]).ok().json()
    }

    /// Waits until a member sees `name` with this many sources; gives the row.
    pub fn wait_listed(&self, member: &str, name: &str, sources: usize) -> Value {
        self.wait_ls(member, PATIENCE, |rows| {
            let row = rows.iter().find(|row| row["name"] == name)?;
            (row["sources"] == sources).then(|| row.clone())
        })
    }

    /// Waits until the listing is as wanted.
    pub fn wait_ls<T>(
        &self,
        member: &str,
        within: Duration,
        mut wanted: impl FnMut(&[Value]) -> Option<T>,
    ) -> T {
        let mut last = Vec::new();
        wait_until(
            &format!("the listing as {member} sees it is as wanted"),
            within,
            || {
                last = self.ls(member);
                wanted(&last)
            },
        )
    }

    /// Writes a file of `size` bytes that look random; the same `seed` gives the same bytes. Gives their content id.
    pub fn write(&self, name: &str, size: u64, seed: &str) -> String {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut stream = blake3::Hasher::new().update(seed.as_bytes()).finalize_xof();
        let mut id = blake3::Hasher::new();
        let mut file = File::create(path).unwrap();
        let mut left = usize::try_from(size).unwrap();
        let mut block = vec![0; 1 << 20];
        while left > 0 {
            let n = left.min(block.len());
            stream.fill(&mut block[..n]);
            id.update(&block[..n]);
            file.write_all(&block[..n]).unwrap();
            left -= n;
        }
        id.finalize().to_hex().to_string()
    }

    /// Gives `to` the same bytes as `from`, without copying them.
    pub fn same(&self, from: &str, to: &str) {
        let to = self.path(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::hard_link(self.path(from), to).unwrap();
    }

    /// Demands that two files hold the same bytes.
    #[track_caller]
    pub fn assert_same(&self, a: &str, b: &str) {
        let open = |name: &str| {
            File::open(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let (mut a, mut b) = (open(a), open(b));
        assert_eq!(
            a.seek(SeekFrom::End(0)).unwrap(),
            b.seek(SeekFrom::End(0)).unwrap()
        );
        a.rewind().unwrap();
        b.rewind().unwrap();
        let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        loop {
            let n = a.read(&mut left).unwrap();
            b.read_exact(&mut right[..n]).unwrap();
            assert!(left[..n] == right[..n], "{a:?} and {b:?} differ");
            if n == 0 {
                return;
            }
        }
    }

    /// Every file beneath a folder, relative to it, in order.
    pub fn files_in(&self, folder: &str) -> Vec<String> {
        fn walk(root: &Path, at: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(at).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(root, &path, found);
                } else {
                    found.push(
                        path.strip_prefix(root)
                            .unwrap()
                            .to_string_lossy()
                            .into_owned(),
                    );
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.path(folder), &self.path(folder), &mut found);
        found.sort();
        found
    }
}

/// The object that a service prints once it serves.
fn first_line(process: &mut Process) -> Value {
    let line = wait_until("a service starts", PATIENCE, || {
        let said = process.stdout();
        let line = said.split_once('\n').map(|(line, _)| line.to_owned());
        assert!(line.is_some() || process.is_running(), "{}", process.said());
        line
    });
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

impl Drop for Swarm {
    fn drop(&mut self) {
        for process in self.running.values_mut() {
            process.kill();
            if thread::panicking() {
                eprintln!("{}", process.said());
            }
        }
        let folder = self.folder.path().to_string_lossy().into_owned();
        let of_ours = |pid: &str| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| contains(&line, &folder))
        };
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let alive: Vec<String> = names
            .filter(|name| name.parse::<u32>().is_ok() && of_ours(name))
            .collect();
        assert!(
            alive.is_empty() || thread::panicking(),
            "still alive: {alive:?}"
        );
    }
}

fn contains(line: &[u8], text: &str) -> bool {
    line.windows(text.len())
        .any(|window| window == text.as_bytes())
}
