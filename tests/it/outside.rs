//! What a running peer fetched into folders that it does not share: it holds none of them open, and what is deleted there
//! leaves the listing.

use std::{fs, path::Path, process::Command};

use crate::{
    full_disk::SmallDisk,
    process::PATIENCE,
    swarm::{Swarm, skip},
};

/// A peer `a` that shares so many files, and a running peer `sink` that rescans every second.
fn network(n_files: usize) -> Swarm {
    let mut swarm = Swarm::with(&[("SPRAT_PEER_RESCAN_SECONDS", "1")]);
    for n in 0..n_files {
        swarm.write(&format!("a-files/{n}"), 90_000, &n.to_string());
    }
    swarm.sharing_peer("a", &[]);
    swarm.sharing_peer("sink", &[]);
    swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() == n_files).then_some(())
    });
    swarm
}

fn open_files(swarm: &mut Swarm) -> Vec<String> {
    let pid = swarm.running("sink").child().id();
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut open: Vec<String> = links
        .filter_map(|link| fs::read_link(link.unwrap().path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    assert!(!open.is_empty());
    open.sort();
    open
}

#[test]
fn gets_into_many_folders_keep_none_of_them_open() {
    const N: usize = 10;
    let mut swarm = network(N);
    for n in 0..N {
        let folder = format!("got/{n}/deep/");
        swarm
            .run("sink", ["get", &n.to_string(), "-o", &folder])
            .ok();
    }
    swarm.wait_ls("a", PATIENCE, |rows| {
        rows.iter().all(|row| row["sources"] == 2).then_some(())
    });
    let folder = swarm.path("").canonicalize().unwrap();
    let held: Vec<_> = open_files(&mut swarm)
        .into_iter()
        .filter(|path| path.starts_with(folder.join("got").to_str().unwrap()))
        .collect();
    assert!(held.is_empty(), "{held:?}");
    // They are still served from there.
    swarm.kill("a");
    swarm.join("other");
    swarm.wait_listed("other", "0", 1);
    swarm.run("other", ["get", "0", "-o", "again"]).ok();
    swarm.assert_same("a-files/0", "again");
}

#[test]
fn what_is_deleted_or_edited_outside_of_shares_leaves_the_listing() {
    let swarm = network(3);
    for n in ["0", "1", "2"] {
        swarm.run("sink", ["get", n, "-o", "got/"]).ok();
        swarm.wait_listed("a", n, 2);
    }
    fs::remove_file(swarm.path("got/0")).unwrap();
    fs::write(swarm.path("got/1"), "other bytes").unwrap();
    for (n, sources) in [("0", 1), ("1", 1), ("2", 2)] {
        swarm.wait_listed("a", n, sources);
    }
}

#[test]
fn a_share_that_nobody_reads_holds_nothing_open() {
    let mut swarm = network(1);
    swarm.write("sink-files/sub/film", 90_000, "film");
    swarm.wait_listed("a", "sub/film", 1);
    swarm.run("a", ["get", "sub/film", "-o", "copy"]).ok();
    let share = swarm.path("sink-files").canonicalize().unwrap();
    let held: Vec<_> = open_files(&mut swarm)
        .into_iter()
        .filter(|path| path.starts_with(share.to_str().unwrap()))
        .collect();
    assert!(held.is_empty(), "{held:?}");
}

#[test]
fn the_disk_of_an_idle_share_can_be_unmounted() {
    let mut swarm = network(1);
    let Some(mut disk) = SmallDisk::in_memory(&mut swarm, "disk", "disk-files") else {
        return skip("the disk of an idle share: this user may not mount one");
    };
    fs::write(Path::new(&disk.folder).join("film"), [7; 90_000]).unwrap();
    swarm.sharing_peer("disk", &[]);
    swarm.wait_listed("a", "film", 1);
    let holder = disk.holder.child().id().to_string();
    let enter = ["-U", "-m", "--preserve-credentials", "--target", &holder];
    let folder = swarm.path("disk-files");
    let unmounted = Command::new("nsenter")
        .args(enter)
        .args(["umount".as_ref(), folder.as_os_str()])
        .status();
    assert!(unmounted.unwrap().success());
    swarm.wait_ls("a", PATIENCE, |rows| (rows.len() == 1).then_some(()));
}
