//! What happens in a shared folder is seen in the listing, soon, without restart.

use std::{
    fs::{self, File},
    process::Command,
    time::{Duration, SystemTime},
};

use serde_json::Value;

use crate::{
    process::PATIENCE,
    swarm::{Swarm, skip},
};

/// Two seconds after a file is quiet it is to be listed; the rest is for a busy machine and for asking.
const SOON: Duration = Duration::from_secs(6);

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect()
}

#[test]
fn create_edit_rename_and_delete_are_seen() {
    let mut swarm = Swarm::start();
    swarm.sharing_peer("a", &[]);
    swarm.join("b");
    assert_eq!(swarm.ls("b"), [] as [Value; 0]);

    let id = swarm.write("a-files/deep/er/new.bin", 700_000, "new");
    swarm.wait_ls("b", SOON, |rows| {
        (names(rows) == ["deep/er/new.bin"] && rows[0]["content_id"] == *id).then_some(())
    });

    let id = swarm.write("a-files/deep/er/new.bin", 800_001, "edited");
    swarm.wait_ls("b", SOON, |rows| {
        (rows.len() == 1 && rows[0]["content_id"] == *id).then_some(())
    });
    assert_eq!(swarm.ls("b")[0]["size"], 800_001);

    fs::rename(
        swarm.path("a-files/deep/er/new.bin"),
        swarm.path("a-files/moved.bin"),
    )
    .unwrap();
    swarm.wait_ls("b", SOON, |rows| {
        (names(rows) == ["moved.bin"]).then_some(())
    });
    fs::create_dir(swarm.path("a-files/one")).unwrap();
    fs::rename(
        swarm.path("a-files/moved.bin"),
        swarm.path("a-files/one/moved.bin"),
    )
    .unwrap();
    fs::rename(swarm.path("a-files/one"), swarm.path("a-files/two")).unwrap();
    swarm.wait_ls("b", SOON, |rows| {
        (names(rows) == ["two/moved.bin"]).then_some(())
    });
    assert_eq!(swarm.ls("b")[0]["content_id"], *id);

    swarm
        .run("b", ["get", "two/moved.bin", "-o", "copy.bin"])
        .ok();
    swarm.assert_same("a-files/two/moved.bin", "copy.bin");

    fs::remove_dir_all(swarm.path("a-files/two")).unwrap();
    swarm.wait_ls("b", SOON, |rows| rows.is_empty().then_some(()));
}

#[test]
fn a_download_becomes_a_source_and_stays_one() {
    let mut swarm = Swarm::start();
    let id = swarm.write("a-files/film", 3_000_000, "film");
    swarm.sharing_peer("a", &[]);
    fs::create_dir(swarm.path("b-downloads")).unwrap();
    let b = swarm.sharing_peer("b", &["--downloads", "b-downloads"]);
    swarm.join("c");
    swarm.wait_listed("c", "film", 1);
    swarm.run("b", ["get", "film"]).ok();
    swarm.assert_same("a-files/film", "b-downloads/film");
    let row = swarm.wait_listed("c", "film", 2);
    assert_eq!(row["content_id"], *id);

    swarm.kill("a");
    let summary = swarm
        .run("c", ["get", "film", "-o", "copy", "--json"])
        .ok()
        .summary();
    assert_eq!(summary["sources"][0]["peer"], *b);
    swarm.assert_same("a-files/film", "copy");

    let stopped = swarm.take("b");
    stopped.signal(rustix::process::Signal::TERM);
    stopped.finish(PATIENCE).ok();
    swarm.sharing_peer("b", &["--downloads", "b-downloads"]);
    let c = swarm.run("c", ["ls", "--json"]).ok().json();
    assert!(c.iter().any(|row| row["name"] == "film"), "{c:?}");
}

#[test]
fn two_names_are_one_swarm_and_one_name_may_be_two_contents() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/x", 300_000, "same");
    swarm.write("b-files/y", 300_000, "same");
    let first = swarm.write("a-files/both", 10_000, "one");
    let second = swarm.write("b-files/both", 10_000, "two");
    swarm.sharing_peer("a", &[]);
    swarm.sharing_peer("b", &[]);
    swarm.join("c");
    swarm.wait_listed("c", "x", 2);
    swarm.wait_listed("c", "y", 2);
    swarm.wait_ls("c", SOON, |rows| (rows.len() == 4).then_some(()));

    let refused = swarm
        .run("c", ["get", "both", "-o", "out"])
        .fails(3, &[&first[..16], &second[..16]]);
    assert_eq!(refused.stdout, "");
    swarm.run("c", ["get", &second[..16], "-o", "out"]).ok();
    swarm.assert_same("b-files/both", "out");
}

#[test]
fn a_folder_may_be_shared_and_downloaded_to() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/films/film", 3_000_000, "film");
    swarm.sharing_peer("a", &[]);
    swarm.write("b-files/own", 10, "own");
    swarm.sharing_peer("b", &["--downloads", "b-files"]);
    swarm.wait_listed("b", "films/film", 1);
    swarm.wait_listed("a", "own", 1);
    swarm.run("b", ["get", "**"]).ok();
    swarm.wait_listed("a", "films/film", 2);
    assert_eq!(names(&swarm.ls("a")), ["films/film", "own"]);
    assert_eq!(swarm.files_in("b-files"), ["films/film", "own"]);
    fs::remove_file(swarm.path("b-files/films/film")).unwrap();
    swarm.wait_listed("a", "films/film", 1);
}

#[test]
fn a_file_is_read_once_and_not_again_after_a_restart() {
    const SIZE: u64 = 64 << 20;
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", SIZE, "film");
    let an_hour_ago = SystemTime::now() - Duration::from_secs(3600);
    File::options()
        .write(true)
        .open(swarm.path("a-files/film"))
        .unwrap()
        .set_modified(an_hour_ago)
        .unwrap();
    let read = |swarm: &mut Swarm| -> u64 {
        let io =
            fs::read_to_string(format!("/proc/{}/io", swarm.running("a").child().id())).unwrap();
        io.lines()
            .find_map(|line| line.strip_prefix("rchar: "))
            .unwrap()
            .parse()
            .unwrap()
    };
    swarm.sharing_peer("a", &[]);
    swarm.wait_listed("a", "film", 1);
    let first = read(&mut swarm);
    assert!(
        (SIZE..SIZE * 5 / 4).contains(&first),
        "read {first} bytes to hash {SIZE}"
    );
    swarm.kill("a");
    swarm.sharing_peer("a", &[]);
    swarm.wait_listed("a", "film", 1);
    let again = read(&mut swarm);
    assert!(again < SIZE / 4, "read {again} bytes to know {SIZE} again");
}

#[test]
fn share_without_a_running_peer_becomes_one() {
    let mut swarm = Swarm::start();
    swarm.write("films/film", 10, "film");
    swarm.join("a");
    let share = swarm.spawn(
        "a",
        [
            "share",
            "films",
            "--name",
            "more",
            "--listen",
            "127.0.0.1:0",
        ],
    );
    swarm.wait_listed("a", "more/film", 1);
    share.signal(rustix::process::Signal::TERM);
    share.finish(PATIENCE).ok();
    swarm.start_peer("a", &[]);
    assert_eq!(swarm.ls("a").len(), 0, "only a running peer remembers");
}

#[test]
fn listings_can_be_narrowed() {
    let mut swarm = Swarm::start();
    for (name, size) in [
        ("movies/alien.mkv", 3000),
        ("movies/old/brazil.mkv", 2000),
        ("notes.TXT", 1),
    ] {
        swarm.write(&format!("a-files/{name}"), size, name);
    }
    let a = swarm.sharing_peer("a", &[]);
    swarm.write("b-files/other.mkv", 10, "other");
    let b = swarm.sharing_peer("b", &[]);
    swarm.wait_ls("b", PATIENCE, |rows| (rows.len() == 4).then_some(()));
    for (args, expected) in [
        (&["ls", "movies/*.mkv"][..], &["movies/alien.mkv"][..]),
        (
            &["ls", "**/*.mkv"],
            &["movies/alien.mkv", "movies/old/brazil.mkv", "other.mkv"],
        ),
        (
            &["ls", "movies/"],
            &["movies/alien.mkv", "movies/old/brazil.mkv"],
        ),
        (
            &["ls", "movies"],
            &["movies/alien.mkv", "movies/old/brazil.mkv"],
        ),
        (
            &["ls", "--min-size", "2000", "--max-size", "2KiB"],
            &["movies/old/brazil.mkv"],
        ),
        (&["ls", "--peer", &b], &["other.mkv"]),
        (&["ls", "--peer", &a, "--max-size", "1"], &["notes.TXT"]),
        (&["search", "BRAZ"], &["movies/old/brazil.mkv"]),
        (&["search", "txt"], &["notes.TXT"]),
        (&["ls", "nothing/*"], &[]),
    ] {
        let rows = swarm.run("b", [args, &["--json"]].concat()).ok().json();
        assert_eq!(names(&rows), expected, "{args:?}");
    }
    let shown = swarm.run("b", ["ls"]).ok();
    assert!(
        shown.stdout.contains("movies/alien.mkv") && shown.stdout.lines().count() == 5,
        "{shown:#?}"
    );
}

#[test]
fn more_folders_than_the_kernel_watches_are_looked_at_again_and_again() {
    const LIMITED: &[&str] = &[
        "unshare",
        "-Ur",
        "sh",
        "-c",
        "echo 20 > /proc/sys/user/max_inotify_watches && exec \"$@\"",
        "sh",
    ];
    let probe = Command::new(LIMITED[0])
        .args(&LIMITED[1..])
        .arg("true")
        .output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        return skip("a limit of inotify watches: this user may not set one");
    }
    let mut swarm = Swarm::start();
    swarm.wrap("a", LIMITED);
    for i in 0..40 {
        swarm.write(&format!("a-files/{i}/file"), 10, &format!("{i}"));
    }
    swarm.sharing_peer("a", &[]);
    let mode = |swarm: &Swarm| {
        let status = swarm.wait_status("a", "has scanned", |status| {
            status["shares"][0]["files"].as_u64() >= Some(40)
        });
        status["shares"][0]["mode"].as_str().unwrap().to_owned()
    };
    let told = mode(&swarm);
    for words in [
        "user.max_inotify_watches is 20",
        "41 directories",
        "`sysctl user.max_inotify_watches=",
    ] {
        assert!(told.contains(words), "{told}");
    }
    // Each is found by a look of its own.
    for name in ["0/first", "1/second", "2/third"] {
        swarm.write(&format!("a-files/{name}"), 10, name);
        swarm.wait_listed("a", name, 1);
    }
    assert_eq!(mode(&swarm), told);
    let log = swarm.take("a");
    let warnings = log.stderr().matches("changes are found by").count();
    assert_eq!(warnings, 1, "{}", log.stderr());
}
