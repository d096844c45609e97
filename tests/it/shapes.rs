//! Files of every shape: many and tiny, huge and hollow, empty, oddly named.

use std::{
    fs::{self, File},
    os::unix::{ffi::OsStrExt, fs::symlink},
    time::Duration,
};

use crate::{
    process::PATIENCE,
    swarm::{MIB, Swarm, skip},
};

#[test]
fn thousands_of_small_files_come_as_one_tree() {
    /// More than a page of the listing has.
    const FILES: u64 = 5_000;
    let mut swarm = Swarm::start();
    for i in 0..FILES {
        swarm.write(
            &format!("a-files/tree/{:02}/{i}.txt", i % 40),
            i % 7_000,
            &format!("{i}"),
        );
    }
    for file in swarm.files_in("a-files") {
        swarm.same(&format!("a-files/{file}"), &format!("b-files/{file}"));
    }
    swarm.sharing_peer("a", &[]);
    swarm.sharing_peer("b", &[]);
    swarm.join("sink");
    let whole = |rows: &[serde_json::Value]| {
        rows.len() as u64 == FILES && rows.iter().all(|row| row["sources"].as_u64() >= Some(2))
    };
    swarm.wait_ls("sink", PATIENCE, |rows| whole(rows).then_some(()));

    let summary = swarm
        .run("sink", ["get", "tree/", "-o", "copy", "--json"])
        .ok()
        .summary();
    assert_eq!(summary["files"], FILES, "{summary}");
    let names = swarm.files_in("copy");
    assert_eq!(names.len() as u64, FILES);
    let below = if names[0].starts_with("tree/") {
        "a-files"
    } else {
        "a-files/tree"
    };
    assert_eq!(names, swarm.files_in(below));
    names
        .iter()
        .for_each(|name| swarm.assert_same(&format!("{below}/{name}"), &format!("copy/{name}")));

    // The same by a glob costs nothing: everything is here.
    let summary = swarm
        .run("sink", ["get", "tree/**/*.txt", "-o", "copy", "--json"])
        .ok()
        .summary();
    assert_eq!(
        (&summary["files"], &summary["bytes_fetched"]),
        (&FILES.into(), &0.into()),
        "{summary}"
    );
}

#[test]
fn five_gibibytes_of_mostly_nothing() {
    const SIZE: u64 = 5 << 30;
    let free = rustix::fs::statvfs(std::env::temp_dir().as_path()).unwrap();
    if free.f_bavail * free.f_frsize < 12 << 30 {
        return skip("the 5 GiB sparse file: less than 12 GiB are free in the temporary folder");
    }
    let mut swarm = Swarm::start();
    swarm.write("a-files/image", 3 * MIB + 17, "image");
    File::options()
        .write(true)
        .open(swarm.path("a-files/image"))
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    let row = swarm.wait_ls("sink", Duration::from_secs(180), |rows| {
        rows.first().cloned()
    });
    let get = swarm
        .spawn("sink", ["get", "image", "-o", "copy", "--json"])
        .finish(Duration::from_secs(300))
        .ok();
    assert_eq!(get.summary()["bytes_total"], SIZE);
    assert_eq!(
        (
            row["size"].as_u64(),
            fs::metadata(swarm.path("copy")).unwrap().len()
        ),
        (Some(SIZE), SIZE)
    );

    // A second look, by somebody who has not hashed it yet.
    fs::create_dir(swarm.path("c-files")).unwrap();
    fs::rename(swarm.path("copy"), swarm.path("c-files/copy")).unwrap();
    swarm.sharing_peer("c", &[]);
    let again = swarm.wait_ls("sink", Duration::from_secs(180), |rows| {
        rows.iter().find(|row| row["name"] == "copy").cloned()
    });
    assert_eq!(again["content_id"], row["content_id"]);
}

#[test]
fn empty_files_and_odd_names_are_files_like_others() {
    let mut swarm = Swarm::start();
    let names = [
        "empty",
        "with space.txt",
        "übergröße/naïve – 日本語.mkv",
        "-rf",
        "$(id);`x`.sh",
        "%s%n{}",
        "[1] *.txt",
        "quote'\"s",
        "piece",
        "piece and one",
    ];
    let sizes = [
        0,
        5,
        1023,
        1024,
        1025,
        1,
        70_000,
        300_000,
        256 << 10,
        (256 << 10) + 1,
    ];
    let ids: Vec<String> = names
        .iter()
        .zip(sizes)
        .map(|(name, size)| swarm.write(&format!("a-files/{name}"), size, name))
        .collect();
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    let rows = swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() == names.len()).then(|| rows.to_vec())
    });
    for ((name, size), id) in names.iter().zip(sizes).zip(&ids) {
        let row = rows
            .iter()
            .find(|row| row["name"] == *name)
            .unwrap_or_else(|| panic!("{name} is not listed"));
        assert_eq!(
            (row["size"].as_u64(), row["content_id"].as_str()),
            (Some(size), Some(&**id))
        );
        let output = format!("copy of {}", &id[..8]);
        swarm.run("sink", ["get", "-o", &output, "--", name]).ok();
        swarm.assert_same(&format!("a-files/{name}"), &output);
    }
    swarm.run("sink", ["get", "**", "-o", "all/"]).ok();
    assert_eq!(swarm.files_in("all").len(), names.len());
}

#[test]
fn what_cannot_be_shared_is_skipped_and_counted() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/good", 10, "good");
    swarm.write("secret", 10, "secret");
    symlink("../secret", swarm.path("a-files/link")).unwrap();
    symlink("/etc", swarm.path("a-files/etc")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, swarm.path("a-files/fifo"), 0o644.into()).unwrap();
    let odd: [&[u8]; 4] = [
        b"not utf-8 \xff",
        b"new\nline",
        b"escape\x1b[2J",
        "bidi \u{202e}".as_bytes(),
    ];
    for name in odd {
        fs::write(
            swarm
                .path("a-files")
                .join(std::ffi::OsStr::from_bytes(name)),
            "x",
        )
        .unwrap();
    }
    swarm.sharing_peer("a", &[]);
    swarm.wait_listed("a", "good", 1);
    let status = swarm.wait_status("a", "has counted", |status| {
        status["files_skipped"].as_u64() >= Some(7)
    });
    assert_eq!(
        (&status["files"], &status["files_skipped"]),
        (&1.into(), &7.into()),
        "{status}"
    );
    assert_eq!(swarm.ls("a").len(), 1);
    let said = swarm.running("a").said();
    assert!(
        !said.contains('\u{202e}') && !said.contains("\u{1b}[2J"),
        "{said:?}"
    );
}

#[test]
fn shares_have_prefixes_and_the_first_wins() {
    let mut swarm = Swarm::start();
    let first = swarm.write("one/film", 10, "one");
    swarm.write("two/film", 10, "two");
    swarm.write("two/other", 10, "other");
    swarm.write("three/film", 10, "three");
    swarm.join("a");
    swarm.start_peer(
        "a",
        &["--share", "one", "--share", "two", "--share", "raw=three"],
    );
    let rows = swarm.wait_ls("a", PATIENCE, |rows| {
        (rows.len() >= 3).then(|| rows.to_vec())
    });
    let names: Vec<_> = rows
        .iter()
        .map(|row| row["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["film", "other", "raw/film"]);
    assert_eq!(rows[0]["content_id"], *first);

    // One more while it runs, remembered over a restart.
    swarm.write("four/late", 10, "late");
    swarm.run("a", ["share", "four", "--name", "more"]).ok();
    swarm.wait_listed("a", "more/late", 1);
    swarm.kill("a");
    swarm.start_peer("a", &["--share", "one"]);
    swarm.wait_ls("a", PATIENCE, |rows| {
        let names: Vec<_> = rows
            .iter()
            .map(|row| row["name"].as_str().unwrap())
            .collect();
        (names == ["film", "more/late"]).then_some(())
    });
}
