//! What an operator meets in a year: a backup that is needed, a full disk, a wrong clock, a tracker that is away, folders
//! of other users. Each says in one line what is wrong, `status --check` says it too, and it ends when its cause ends.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, chown},
        net::UnixDatagram,
    },
    path::PathBuf,
    process::Command,
};

use rustix::process::Signal;

use crate::{
    full_disk::{SmallDisk, fill},
    process::{Outcome, PATIENCE, wait_until},
    swarm::{Swarm, TRACKER, skip},
};

const LOCAL: [&str; 2] = ["--listen", "127.0.0.1:0"];

/// Runs a command of this machine in the swarm's folder.
fn run(swarm: &Swarm, line: &str) {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    swarm
        .spawn_command(command.args(words).current_dir(swarm.path("")), None)
        .finish(PATIENCE)
        .ok();
}

/// Waits until `status --check` of a member ends with this code; gives what it said.
fn wait_check(swarm: &Swarm, member: &str, code: i32) -> Outcome {
    wait_until(
        &format!("the health of {member} is {code}"),
        PATIENCE,
        || {
            let checked = swarm.run(member, ["status", "--check"]);
            (checked.code == Some(code)).then_some(checked)
        },
    )
}

#[test]
fn a_running_tracker_is_backed_up_and_restored() {
    let mut swarm = Swarm::start();
    let address = swarm.address().to_owned();
    swarm.write("a-files/film", 1000, "film");
    swarm.sharing_peer("a", &[]);
    let [thief, _] = ["thief", "b"].map(|member| swarm.join(member));
    let link = swarm.link(1);

    // As the guide says. Nothing is written while the process stands still.
    swarm.running(TRACKER).signal(Signal::STOP);
    run(&swarm, "tar --exclude=*.sock -czf backup.tar.gz tracker");
    swarm.running(TRACKER).signal(Signal::CONT);
    swarm.join("late");
    swarm.run(TRACKER, ["tracker", "revoke", &thief]).ok();
    swarm.run("thief", ["ls"]).fails(11, &[&address]);

    swarm.kill(TRACKER);
    fs::remove_dir_all(swarm.path(TRACKER)).unwrap();
    wait_check(&swarm, "a", 10);
    run(&swarm, "tar -xzf backup.tar.gz");
    swarm.start_tracker(&["--listen", &address]);
    wait_check(&swarm, "a", 0);
    for member in ["b", "late"] {
        swarm.wait_listed(member, "film", 1);
        swarm
            .run(member, ["get", "film", "-o", &format!("{member}.copy")])
            .ok();
    }
    swarm.run("new", ["join", &link]).ok();
    // What happened after the backup has to be done again.
    swarm.run("thief", ["ls"]).ok();
    swarm.run(TRACKER, ["tracker", "revoke", &thief]).ok();
    swarm.run("thief", ["ls"]).fails(11, &[&address]);
    let members = swarm
        .run(TRACKER, ["tracker", "members", "--json"])
        .ok()
        .json();
    assert_eq!(members.len(), 4, "a, thief, b and new: {members:?}");
}

#[test]
fn a_damaged_backup_is_refused() {
    let mut swarm = Swarm::start();
    swarm.kill(TRACKER);
    let database = swarm.path("tracker/tracker.redb");
    let mut bytes = fs::read(&database).unwrap();
    bytes.truncate(9_001);
    fs::write(&database, &bytes).unwrap();
    swarm
        .run(TRACKER, [&["tracker", "run"], &LOCAL[..]].concat())
        .fails(1, &["tracker.redb"]);
    assert_eq!(fs::read(&database).unwrap(), bytes, "it is left as it was");
    fs::remove_file(swarm.path("tracker/authority/ca.key")).unwrap();
    swarm
        .run(TRACKER, [&["tracker", "run"], &LOCAL[..]].concat())
        .fails(1, &["ca.key"]);
}

#[test]
fn a_tracker_whose_disk_is_full_says_so_and_recovers() {
    let mut swarm = Swarm::empty();
    let Some(mut disk) = SmallDisk::in_memory(&mut swarm, TRACKER, TRACKER) else {
        return skip("a tracker on a full disk: this user may not mount one");
    };
    swarm.start_tracker(&LOCAL);
    swarm.write("a-files/film", 1000, "film");
    swarm.sharing_peer("a", &[]);
    let link = swarm.link(1);
    let filler = swarm.path(&format!("{}/filler", disk.folder));
    fill(&filler);
    for _ in 0..2 {
        let create = ["tracker", "token", "create"];
        swarm
            .run(TRACKER, create)
            .fails(1, &["tracker.redb", "No space left on device"]);
    }
    swarm
        .run("b", ["join", &link])
        .fails(10, &[swarm.address(), "room on its disk"]);
    swarm
        .run(TRACKER, ["status", "--check"])
        .fails(8, &["no room left on its disk"]);
    // Who is in notices nothing.
    swarm.wait_listed("a", "film", 1);
    swarm.run("a", ["status", "--check"]).ok();

    fs::remove_file(filler).unwrap();
    swarm.run(TRACKER, ["status", "--check"]).ok();
    swarm.run("b", ["join", &link]).ok();
    swarm.run("b", ["get", "film", "-o", "copy"]).ok();
    assert!(disk.holder.is_running());
}

#[test]
fn a_peer_whose_disk_is_full_serves_on() {
    let mut swarm = Swarm::start();
    let Some(mut disk) = SmallDisk::in_memory(&mut swarm, "a", "a") else {
        return skip("a peer's state on a full disk: this user may not mount one");
    };
    swarm.join("a");
    swarm.join("b");
    swarm.write("a-files/film", 1000, "film");
    swarm.start_peer("a", &["--share", "a-files"]);
    let filler = swarm.path(&format!("{}/filler", disk.folder));
    fill(&filler);
    swarm.write("a-files/late", 1000, "late");
    swarm.wait_listed("b", "late", 1);
    swarm
        .run("a", ["status", "--check"])
        .fails(8, &["no room left on its disk"]);
    swarm.run("b", ["get", "late", "-o", "copy"]).ok();

    fs::remove_file(filler).unwrap();
    swarm.run("a", ["status", "--check"]).ok();
    // What it learns now is remembered again.
    let index = format!("{}/index.redb", disk.folder);
    let before = fs::read(swarm.path(&index)).unwrap();
    swarm.write("a-files/later", 1000, "later");
    swarm.wait_listed("b", "later", 1);
    wait_until("the index is written again", PATIENCE, || {
        (fs::read(swarm.path(&index)).unwrap() != before).then_some(())
    });
    assert!(disk.holder.is_running());
}

#[test]
fn a_tracker_that_is_away_is_missed_and_found_again() {
    let mut swarm = Swarm::start();
    let address = swarm.address().to_owned();
    swarm.run(TRACKER, ["status", "--check"]).ok();
    swarm.join("a");
    swarm.start_peer("a", &[]);
    swarm.kill(TRACKER);
    let checked = wait_check(&swarm, "a", 10);
    checked.fails(10, &[&address, "is the tracker running"]);
    swarm
        .run(TRACKER, ["status", "--check"])
        .fails(3, &["nothing runs"]);
    swarm.start_tracker(&["--listen", &address]);
    wait_check(&swarm, "a", 0);
}

/// The library that gives one process another clock, where it is installed.
fn clock_library() -> Option<PathBuf> {
    let folders = fs::read_dir("/usr/lib")
        .ok()?
        .flatten()
        .map(|entry| entry.path().join("faketime"));
    folders
        .map(|folder| folder.join("libfaketime.so.1"))
        .find(|library| library.exists())
}

#[test]
fn a_wrong_clock_is_named_and_forgiven() {
    let Some(library) = clock_library() else {
        return skip("wrong clocks: need libfaketime (package faketime)");
    };
    let swarm = Swarm::start();
    swarm.join("a");
    let link = swarm.link(9);
    let off = |by: &str, member: &str, args: &[&str]| {
        let mut command = swarm.command(member, args);
        command
            .env("LD_PRELOAD", &library)
            .env("FAKETIME", by)
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        swarm.spawn_command(&mut command, None).finish(PATIENCE)
    };
    for by in ["+1y", "-1y"] {
        for (member, args) in [("a", &["ls"][..]), ("new", &["join", &link])] {
            off(by, member, args).fails(11, &[swarm.address(), "this machine's clock says", "UTC"]);
        }
    }
    off("+1h", "a", &["ls"]).ok();
    off("-50m", "a", &["ls"]).ok();

    // A clock that is set right while the peer runs.
    let clock = swarm.path("clock");
    fs::write(&clock, "-1y\n").unwrap();
    let mut command = swarm.command("a", [&["peer"], &LOCAL[..]].concat());
    command
        .env("LD_PRELOAD", &library)
        .env("FAKETIME_TIMESTAMP_FILE", &clock);
    command
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let peer = swarm.spawn_command(&mut command, None);
    wait_until("the peer serves", PATIENCE, || {
        peer.stdout().contains("listening").then_some(())
    });
    let checked = wait_check(&swarm, "a", 11);
    checked.fails(11, &[swarm.address(), "this machine's clock says"]);
    fs::write(&clock, "+0\n").unwrap();
    wait_check(&swarm, "a", 0);
}

#[test]
fn a_clock_too_far_off_to_renew_is_named() {
    let Some(library) = clock_library() else {
        return skip("wrong clocks: need libfaketime (package faketime)");
    };
    let mut swarm = Swarm::empty();
    // Good for longer than the clock is off, unlike the tracker's usual one.
    run(
        &swarm,
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 9 -subj /CN=tracker",
    );
    fs::set_permissions(swarm.path("key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    swarm.set("SPRAT_TRACKER_LEAF_LIFETIME_SECONDS", "600");
    swarm.start_tracker(
        &[
            &LOCAL[..],
            &["--certificate", "cert.pem", "--certificate-key", "key.pem"],
        ]
        .concat(),
    );
    swarm.join("a");
    let mut command = swarm.command("a", ["ls"]);
    command
        .env("LD_PRELOAD", &library)
        .env("FAKETIME", "+1h")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let listed = swarm.spawn_command(&mut command, None).finish(PATIENCE);
    listed.fails(
        11,
        &[
            swarm.address(),
            "the clocks of this machine and the tracker differ by 3",
        ],
    );
}

#[test]
fn state_directories_that_cannot_be_used_are_named() {
    let swarm = Swarm::empty();
    let closed = "the state directory cannot be used";
    for args in [&["tracker", "init"][..], &["tracker", "run"]] {
        swarm
            .run("", [&["--state-dir", "/sys/sprat"], args].concat())
            .fails(8, &["/sys/sprat", closed]);
    }
    if !rustix::process::geteuid().is_root() {
        return skip("state directories of other users: need root");
    }
    fs::create_dir(swarm.path("theirs")).unwrap();
    fs::set_permissions(swarm.path("theirs"), fs::Permissions::from_mode(0o700)).unwrap();
    chown(swarm.path("theirs"), Some(1234), Some(1234)).unwrap();
    let owner = ["theirs", "belongs to user 1234", "chown -R 0"];
    swarm
        .run("theirs", [&["tracker", "run"], &LOCAL[..]].concat())
        .fails(8, &owner);
}

#[test]
fn a_service_manager_hears_of_start_and_stop() {
    let mut swarm = Swarm::empty();
    let manager = UnixDatagram::bind(swarm.path("notify")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let hears = |word: &str| {
        let mut said = [0; 64];
        let n_bytes = manager.recv(&mut said).unwrap();
        assert_eq!(String::from_utf8_lossy(&said[..n_bytes]), word);
    };
    let socket = swarm.path("notify").display().to_string();
    swarm.set("NOTIFY_SOCKET", &socket);
    swarm.start_tracker(&LOCAL);
    hears("READY=1");
    swarm.join("a");
    swarm.start_peer("a", &[]);
    hears("READY=1");
    for member in ["a", TRACKER] {
        let process = swarm.take(member);
        process.signal(Signal::TERM);
        process.finish(PATIENCE).ok();
        hears("STOPPING=1");
    }
    // Nobody listens there any more: no reason not to serve.
    drop(manager);
    swarm.start_tracker(&LOCAL);
}
