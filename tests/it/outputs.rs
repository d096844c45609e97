//! Where `get` puts things, and what it never does: replace, guess, leave halves.

use std::{fs, os::unix::fs::symlink, path::PathBuf, process::Command};

use crate::{
    process::PATIENCE,
    swarm::{Swarm, skip},
};

/// A network with four files; `sink` has joined.
fn network() -> Swarm {
    let mut swarm = Swarm::start();
    swarm.write("a-files/movies/alien.mkv", 700_000, "alien");
    swarm.write("a-files/movies/brazil.mkv", 600_000, "brazil");
    swarm.write("a-files/movies/notes.txt", 100, "notes");
    swarm.write("a-files/readme", 10, "readme");
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.wait_ls("sink", PATIENCE, |rows| (rows.len() == 4).then_some(()));
    swarm
}

const ALIEN: &str = "movies/alien.mkv";
const SOURCE: &str = "a-files/movies/alien.mkv";

#[test]
fn output_names_a_file_or_a_folder() {
    let swarm = network();
    let landed = |folder: &str| -> Vec<String> {
        let names = swarm.files_in(folder);
        assert!(
            names.iter().all(|name| !name.ends_with(".part")),
            "{names:?}"
        );
        names
    };
    // A file to create, its folder too.
    swarm.run("sink", ["get", ALIEN, "-o", "new.mkv"]).ok();
    swarm.assert_same(SOURCE, "new.mkv");
    swarm
        .run("sink", ["get", ALIEN, "-o", "some/where/new.mkv"])
        .ok();
    swarm.assert_same(SOURCE, "some/where/new.mkv");
    // A folder: because it ends in a slash, because it is one, because several match.
    for (what, output, n) in [
        (ALIEN, "slash/", 1),
        (ALIEN, "is-one", 1),
        ("movies/*.mkv", "several", 2),
        ("movies/", "tree", 3),
        ("**", "all", 4),
    ] {
        if output == "is-one" {
            fs::create_dir(swarm.path(output)).unwrap();
        }
        let summary = swarm
            .run("sink", ["get", what, "-o", output, "--json"])
            .ok()
            .summary();
        assert_eq!(summary["files"], n, "{what}: {summary}");
        let names = landed(output);
        assert_eq!(names.len(), n, "{what}: {names:?}");
        let alien = names
            .iter()
            .find(|name| name.ends_with("alien.mkv"))
            .unwrap();
        swarm.assert_same(SOURCE, &format!("{output}/{alien}"));
    }
    // By content id, and by the beginning of one.
    let id = swarm.ls("sink")[0]["content_id"]
        .as_str()
        .unwrap()
        .to_owned();
    swarm.run("sink", ["get", &id, "-o", "by-id"]).ok();
    swarm.run("sink", ["get", &id[..8], "-o", "by-prefix"]).ok();
    swarm.assert_same(SOURCE, "by-id");
    swarm.assert_same(SOURCE, "by-prefix");
    // Without -o: here.
    swarm.run("sink", ["get", "readme"]).ok();
    swarm.assert_same("a-files/readme", "readme");
    // Relative to where the command runs.
    fs::create_dir(swarm.path("below")).unwrap();
    let mut below = swarm.command("sink", ["get", "readme", "-o", "../above"]);
    swarm
        .spawn_command(below.current_dir(swarm.path("below")), None)
        .finish(PATIENCE)
        .ok();
    swarm.assert_same("a-files/readme", "above");
}

#[test]
fn output_is_relative_to_the_command_also_when_a_running_peer_works() {
    let mut swarm = network();
    swarm.start_peer("sink", &[]);
    fs::create_dir(swarm.path("below")).unwrap();
    let mut below = swarm.command("sink", ["get", ALIEN, "-o", "here.mkv"]);
    swarm
        .spawn_command(below.current_dir(swarm.path("below")), None)
        .finish(PATIENCE)
        .ok();
    swarm.assert_same(SOURCE, "below/here.mkv");
}

#[test]
fn what_exists_is_never_replaced() {
    let swarm = network();
    fs::write(swarm.path("different"), "mine").unwrap();
    fs::create_dir_all(swarm.path("full/alien.mkv")).unwrap();
    symlink("nowhere", swarm.path("dangling")).unwrap();
    for name in ["different", "dangling"] {
        swarm
            .run("sink", ["get", ALIEN, "-o", name])
            .fails(9, &[name]);
    }
    assert_eq!(fs::read(swarm.path("different")).unwrap(), b"mine");
    assert_eq!(
        fs::read_link(swarm.path("dangling")).unwrap().to_str(),
        Some("nowhere")
    );
    assert!(!swarm.path("nowhere").exists());
    swarm
        .run("sink", ["get", "movies/*.mkv", "-o", "different"])
        .fails(9, &["different"]);

    // Identical is done already.
    swarm.run("sink", ["get", ALIEN, "-o", "once"]).ok();
    let stamp = fs::metadata(swarm.path("once"))
        .unwrap()
        .modified()
        .unwrap();
    let summary = swarm
        .run("sink", ["get", ALIEN, "-o", "once", "--json"])
        .ok()
        .summary();
    assert_eq!(
        (&summary["bytes_fetched"], &summary["bytes_resumed"]),
        (&0.into(), &700_000.into()),
        "{summary}"
    );
    assert_eq!(
        fs::metadata(swarm.path("once"))
            .unwrap()
            .modified()
            .unwrap(),
        stamp
    );

    // Three ways to go on.
    let skipped = swarm
        .run(
            "sink",
            ["get", ALIEN, "-o", "different", "--skip", "--json"],
        )
        .ok();
    assert!(
        !skipped.stdout.contains(r#""event":"file""#),
        "what differs is not what was asked for: {skipped:?}"
    );
    let summary = skipped.summary();
    assert_eq!(
        (&summary["files"], &summary["files_skipped"]),
        (&0.into(), &1.into()),
        "{summary}"
    );
    assert_eq!(fs::read(swarm.path("different")).unwrap(), b"mine");
    swarm
        .run("sink", ["get", ALIEN, "-o", "different", "--rename"])
        .ok();
    assert_eq!(fs::read(swarm.path("different")).unwrap(), b"mine");
    swarm.assert_same(SOURCE, "different (2)");
    swarm
        .run("sink", ["get", ALIEN, "-o", "dangling", "--overwrite"])
        .fails(9, &["dangling"]);
    swarm
        .run("sink", ["get", ALIEN, "-o", "different", "--overwrite"])
        .ok();
    swarm.assert_same(SOURCE, "different");
    assert_eq!(
        fs::read_link(swarm.path("dangling")).unwrap().to_str(),
        Some("nowhere")
    );
    assert!(
        swarm
            .files_in(".")
            .iter()
            .all(|name| !name.ends_with(".part"))
    );
}

#[test]
fn a_planted_link_leads_nowhere() {
    let swarm = network();
    fs::create_dir_all(swarm.path("outside")).unwrap();
    fs::create_dir_all(swarm.path("downloads")).unwrap();
    symlink("../outside", swarm.path("downloads/movies")).unwrap();
    let got = swarm.run("sink", ["get", "**", "-o", "downloads/"]);
    assert_eq!(swarm.files_in("outside"), [] as [&str; 0], "{got:?}");
    fs::create_dir(swarm.path("parts")).unwrap();
    fs::write(swarm.path("victim"), "mine").unwrap();
    symlink("../victim", swarm.path("parts/new.mkv.part")).unwrap();
    let got = swarm.run("sink", ["get", ALIEN, "-o", "parts/new.mkv"]);
    assert_eq!(fs::read(swarm.path("victim")).unwrap(), b"mine", "{got:?}");
}

#[test]
fn where_nothing_can_be_written_nothing_is_fetched() {
    let swarm = network();
    fs::write(swarm.path("file"), "mine").unwrap();
    swarm
        .run("sink", ["get", ALIEN, "-o", "file/below/new.mkv"])
        .fails(8, &["file"]);
    let why = "/file/: a file or link is where a folder is needed; choose another -o";
    swarm
        .run("sink", ["get", ALIEN, "-o", "file/"])
        .fails(8, &[why]);
    // Not even root may write there.
    swarm
        .run("sink", ["get", ALIEN, "-o", "/proc/new.mkv"])
        .fails(8, &["/proc"]);
}

#[test]
fn a_full_disk_is_told_before_the_first_byte() {
    struct Small(PathBuf);
    impl Drop for Small {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }
    let swarm = network();
    let small = Small(swarm.path("small"));
    fs::create_dir(&small.0).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=640k", "none"])
        .arg(&small.0)
        .output();
    if !mount.is_ok_and(|mount| mount.status.success()) {
        return skip("the full disk: needs root, to mount a small one");
    }
    swarm
        .run("sink", ["get", ALIEN, "-o", "small/"])
        .fails(8, &["space", "small"]);
    assert_eq!(swarm.files_in("small"), [] as [&str; 0]);
    swarm
        .run("sink", ["get", "movies/brazil.mkv", "-o", "small/new.mkv"])
        .ok();
    swarm.assert_same("a-files/movies/brazil.mkv", "small/new.mkv");
}

#[test]
fn what_is_not_listed_is_not_found() {
    let swarm = network();
    swarm
        .run("sink", ["get", "movies/aliens.mkv", "-o", "x"])
        .fails(3, &["did you mean movies/alien.mkv"]);
    swarm
        .run("sink", ["get", "*.iso", "-o", "x"])
        .fails(3, &["*.iso"]);
    swarm
        .run("sink", ["get", &"0".repeat(64), "-o", "x"])
        .fails(3, &["0000"]);
    swarm
        .run("sink", ["get", "../../etc/passwd", "-o", "x"])
        .fails(3, &["passwd"]);
    assert!(!swarm.path("x").exists());
}
