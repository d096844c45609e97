//! What is on this disk already is not downloaded again: an older version, a piece of another file, the same file under
//! another name.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use serde_json::Value;

use crate::{
    process::PATIENCE,
    swarm::{MIB, Swarm},
};

const IMAGE: &str = "images/disk.img";
const SIZE: u64 = 64 * MIB;
const PIECE: u64 = 64 << 10;
/// The updated version: this much of it, from here on, is other than in the older one.
const CHANGED: u64 = MIB;
const CHANGED_AT: u64 = 20 * MIB + 1_000;

/// Writes `old`, and an updated version of it under `new`; gives the content id of the new one.
fn two_versions(swarm: &Swarm, old: &str, new: &str) -> String {
    swarm.write(old, SIZE, "image");
    let mut bytes = fs::read(swarm.path(old)).unwrap();
    let (from, to) = (
        usize::try_from(CHANGED_AT).unwrap(),
        usize::try_from(CHANGED_AT + CHANGED).unwrap(),
    );
    bytes[from..to].iter_mut().for_each(|byte| *byte ^= 0xff);
    let new = swarm.path(new);
    fs::create_dir_all(new.parent().unwrap()).unwrap();
    fs::write(new, &bytes).unwrap();
    blake3::hash(&bytes).to_hex().to_string()
}

/// A network that shares the new version, and a sink that has the older one, of which it knows nothing yet.
fn older_version() -> Swarm {
    let mut swarm = Swarm::start();
    two_versions(&swarm, "old", &format!("a-files/{IMAGE}"));
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.wait_listed("sink", IMAGE, 1);
    let target = swarm.path(IMAGE);
    fs::create_dir_all(target.parent().unwrap()).unwrap();
    fs::copy(swarm.path("old"), &target).unwrap();
    swarm
}

/// Demands that a Get of the image moved no more than the pieces that changed.
#[track_caller]
fn assert_little_moved(summary: &Value) {
    let [total, resumed, fetched] = ["bytes_total", "bytes_resumed", "bytes_fetched"]
        .map(|name| summary[name].as_u64().unwrap());
    assert!(
        (CHANGED..=CHANGED + 2 * PIECE).contains(&fetched),
        "{summary}"
    );
    assert_eq!((total, resumed + fetched), (SIZE, SIZE), "{summary}");
}

#[test]
fn an_update_moves_what_changed() {
    let swarm = older_version();
    swarm
        .run("sink", ["get", IMAGE, "-o", IMAGE])
        .fails(9, &["exists and differs"]);

    let summary = swarm
        .run("sink", ["get", IMAGE, "-o", IMAGE, "--overwrite", "--json"])
        .ok()
        .summary();
    assert_little_moved(&summary);
    swarm.assert_same(&format!("a-files/{IMAGE}"), IMAGE);
    assert_eq!(swarm.files_in("images"), ["disk.img"]);
}

#[test]
fn an_update_beside_the_older_version_moves_what_changed() {
    let swarm = older_version();
    let summary = swarm
        .run("sink", ["get", IMAGE, "-o", IMAGE, "--rename", "--json"])
        .ok()
        .summary();
    assert_little_moved(&summary);
    swarm.assert_same(&format!("a-files/{IMAGE}"), "images/disk (2).img");
    swarm.assert_same("old", IMAGE);
    assert_eq!(swarm.files_in("images"), ["disk (2).img", "disk.img"]);
}

#[test]
fn a_file_that_was_downloaded_is_updated_in_place() {
    let mut swarm = Swarm::start();
    swarm.write(&format!("a-files/{IMAGE}"), SIZE, "image");
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.start_peer("sink", &["--downloads", "downloads"]);
    swarm.wait_listed("sink", IMAGE, 1);
    swarm.run("sink", ["get", IMAGE]).ok();

    let updated = two_versions(&swarm, "old", "new");
    let mut bytes = vec![0; usize::try_from(CHANGED).unwrap()];
    File::open(swarm.path("new"))
        .unwrap()
        .read_exact_at(&mut bytes, CHANGED_AT)
        .unwrap();
    let shared = File::options()
        .write(true)
        .open(swarm.path(&format!("a-files/{IMAGE}")))
        .unwrap();
    shared.write_all_at(&bytes, CHANGED_AT).unwrap();
    drop(shared);
    swarm.wait_ls("sink", PATIENCE, |rows| {
        rows.iter()
            .any(|row| row["content_id"] == *updated)
            .then_some(())
    });

    // Both versions go by that name now; one of them is here.
    let summary = swarm
        .run("sink", ["get", &updated, "--overwrite", "--json"])
        .ok()
        .summary();
    assert_little_moved(&summary);
    swarm.assert_same("new", &format!("downloads/{IMAGE}"));
    assert_eq!(swarm.files_in("downloads"), [IMAGE]);
}

#[test]
fn pieces_of_another_shared_file_are_copied() {
    let mut swarm = Swarm::start();
    two_versions(
        &swarm,
        "sink-files/something else",
        &format!("a-files/{IMAGE}"),
    );
    swarm.sharing_peer("a", &[]);
    swarm.sharing_peer("sink", &["--downloads", "downloads"]);
    swarm.wait_listed("sink", IMAGE, 1);
    swarm.wait_listed("sink", "something else", 1);
    let summary = swarm.run("sink", ["get", IMAGE, "--json"]).ok().summary();
    assert_little_moved(&summary);
    swarm.assert_same(&format!("a-files/{IMAGE}"), &format!("downloads/{IMAGE}"));
    assert_eq!(swarm.files_in("downloads"), [IMAGE]);
}

#[test]
fn one_content_under_two_names_is_fetched_once() {
    let mut swarm = Swarm::start();
    let size = 12 * MIB + 5;
    swarm.write("a-files/tree/one", size, "one");
    swarm.same("a-files/tree/one", "a-files/tree/two");
    swarm.write("a-files/tree/three", MIB, "three");
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.wait_ls("sink", PATIENCE, |rows| (rows.len() == 3).then_some(()));
    let summary = swarm
        .run("sink", ["get", "tree/", "-o", "copy", "--json"])
        .ok()
        .summary();
    assert_eq!(
        (&summary["files"], &summary["bytes_total"]),
        (&3.into(), &(2 * size + MIB).into()),
        "{summary}"
    );
    assert_eq!(
        (&summary["bytes_fetched"], &summary["bytes_resumed"]),
        (&(size + MIB).into(), &size.into())
    );
    let copies = swarm.files_in("copy");
    assert_eq!(copies.len(), 3, "{copies:?}");
    for copy in copies {
        let name = copy.trim_start_matches("tree/");
        swarm.assert_same(&format!("a-files/tree/{name}"), &format!("copy/{copy}"));
    }
}

/// Hundreds of contents that are here already all turn out to be complete while the download begins.
const MANY: usize = 300;

#[test]
fn many_contents_under_two_names_are_fetched_once() {
    let mut swarm = Swarm::start();
    for i in 0..MANY {
        swarm.write(&format!("a-files/one/{i}"), 3_000, &format!("{i}"));
        swarm.same(&format!("a-files/one/{i}"), &format!("a-files/two/{i}"));
    }
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() == 2 * MANY).then_some(())
    });
    let summary = swarm
        .run("sink", ["get", "**", "-o", "copy", "--json"])
        .ok()
        .summary();
    assert_eq!(swarm.files_in("copy"), swarm.files_in("a-files"));
    assert_eq!(
        (&summary["files"], &summary["bytes_fetched"]),
        (&(2 * MANY).into(), &(3_000 * MANY).into())
    );
    assert_eq!(summary["bytes_resumed"], 3_000 * MANY, "{summary}");
    (0..MANY)
        .for_each(|i| swarm.assert_same(&format!("a-files/one/{i}"), &format!("copy/two/{i}")));
}

#[test]
fn many_downloads_that_only_lacked_their_names_get_them() {
    let mut swarm = Swarm::start();
    let size = 257 << 10;
    for i in 0..MANY {
        swarm.write(&format!("a-files/{i}"), size, &format!("{i}"));
        swarm.write(&format!("copy/{i}.part"), size, &format!("{i}"));
    }
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.wait_ls("sink", PATIENCE, |rows| (rows.len() == MANY).then_some(()));
    let summary = swarm
        .run("sink", ["get", "**", "-o", "copy", "--json"])
        .ok()
        .summary();
    assert_eq!(swarm.files_in("copy"), swarm.files_in("a-files"));
    let resumed = size * MANY as u64;
    assert_eq!(
        (&summary["bytes_fetched"], &summary["bytes_resumed"]),
        (&0.into(), &resumed.into()),
        "{summary}"
    );
    (0..MANY).for_each(|i| swarm.assert_same(&format!("a-files/{i}"), &format!("copy/{i}")));
}
