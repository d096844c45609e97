//! A disk that somebody else fills while a download runs: a small one, in a mount namespace of its own. What is told when
//! there is no room from the start is in `outputs.rs`.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::MetadataExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    main_job::wait_progress,
    process::{PATIENCE, Process, wait_until},
    swarm::{MIB, Swarm, skip},
};

const DISK: u64 = 32 * MIB;

/// A small disk as a folder of the swarm, which only one member sees. It lasts as long as the process that holds its
/// mount namespace.
pub struct SmallDisk {
    pub holder: Process,
    /// As it is seen from outside.
    pub folder: String,
}

impl SmallDisk {
    /// One in memory, whose files can have their space reserved; none where this user may not have it.
    pub fn in_memory(swarm: &mut Swarm, member: &str, at: &str) -> Option<Self> {
        Self::in_memory_with(swarm, member, at, &format!("size={DISK}"))
    }

    fn in_memory_with(swarm: &mut Swarm, member: &str, at: &str, options: &str) -> Option<Self> {
        let mount = format!("mount -t tmpfs -o {options} none {at}");
        Self::mount(
            swarm,
            member,
            at,
            "-rm",
            &["-U", "-m", "--preserve-credentials"],
            &mount,
        )
    }

    /// One of an old kind, which cannot reserve space; none without root.
    fn without_fallocate(swarm: &mut Swarm, member: &str) -> Option<Self> {
        File::create(swarm.path("image"))
            .unwrap()
            .set_len(DISK)
            .unwrap();
        let mount = "mke2fs -q -t ext2 -m 0 image && mount -t ext2 -o loop image downloads";
        Self::mount(swarm, member, "downloads", "-m", &["-m"], mount)
    }

    fn mount(
        swarm: &mut Swarm,
        member: &str,
        at: &str,
        unshare: &str,
        enter: &[&str],
        mount: &str,
    ) -> Option<Self> {
        fs::create_dir(swarm.path(at)).unwrap();
        let mut command = Command::new("unshare");
        command.args([
            unshare,
            "sh",
            "-c",
            &format!("{mount} && echo mounted && exec sleep infinity"),
        ]);
        let mut holder = swarm.spawn_command(command.current_dir(swarm.path("")), None);
        wait_until("a disk is mounted, or cannot be", PATIENCE, || {
            (!holder.is_running() || !holder.stdout().is_empty()).then_some(())
        });
        let process = holder.child().id().to_string();
        swarm.wrap(
            member,
            &[&["nsenter", "--target", &process, "--wd"], enter].concat(),
        );
        let folder = format!("/proc/{process}/root{}", swarm.path(at).display());
        holder.is_running().then_some(Self { holder, folder })
    }
}

/// Takes all the space that is left.
pub fn fill(filler: &Path) {
    let mut filler = File::create(filler).unwrap();
    for len in [64 << 10, 4096, 512, 1] {
        while filler.write_all(&vec![1; len]).is_ok() {}
    }
}

/// Waits until a `get --json` has noted this.
pub fn wait_note(get: &mut Process, words: &str) {
    wait_until(&format!("a note says {words:?}"), PATIENCE, || {
        assert!(get.is_running(), "{}", get.said());
        get.stdout()
            .lines()
            .any(|line| line.contains("\"note\"") && line.contains(words))
            .then_some(())
    });
}

/// Takes all inodes that are left.
fn fill_with_files(filler: &Path) {
    fs::create_dir(filler).unwrap();
    (0..)
        .take_while(|n| File::create(filler.join(n.to_string())).is_ok())
        .count();
}

/// The disk is filled while `what` is being fetched to it, which is said once; the rest comes when there is room again.
fn filled_meanwhile(swarm: &mut Swarm, disk: &mut SmallDisk, what: &str, fill: fn(&Path)) {
    swarm.sharing_peer("a", &["--upload-limit", "4MiB"]);
    swarm.join("sink");
    swarm.start_peer("sink", &["--downloads", "downloads"]);
    let names = swarm.files_in("a-files");
    swarm.wait_ls("sink", PATIENCE, |rows| {
        (rows.len() == names.len()).then_some(())
    });
    let mut get = swarm.spawn("sink", ["get", what, "--json"]);
    wait_progress(&mut get, 0.1);
    let filler = swarm.path(&format!("{}/filler", disk.folder));
    fill(&filler);
    wait_note(&mut get, "the disk is full; waiting for room");
    // As long as it is looked at a few times.
    let full = Instant::now();
    wait_until("it was looked at", PATIENCE, || {
        (full.elapsed() > Duration::from_secs(3)).then_some(())
    });
    let said = get.stdout();
    assert_eq!(said.matches("the disk is full").count(), 1, "{said}");
    assert!(!said.contains("there is room again"), "{said}");
    if filler.is_dir() {
        fs::remove_dir_all(filler).unwrap();
    } else {
        fs::remove_file(filler).unwrap();
    }
    let get = get.finish(PATIENCE).ok();
    assert!(get.stdout.contains("there is room again"), "{get:#?}");
    for name in &names {
        swarm.assert_same(
            &format!("a-files/{name}"),
            &format!("{}/{name}", disk.folder),
        );
    }
    assert_eq!(
        swarm.files_in(&disk.folder),
        names,
        "no `.part` and no journal is left"
    );
    assert!(disk.holder.is_running());
}

#[test]
fn many_small_files_wait_for_room() {
    let mut swarm = Swarm::start();
    let Some(mut disk) = SmallDisk::in_memory(&mut swarm, "sink", "downloads") else {
        return skip("many small files on a disk that fills up: this user may not mount one");
    };
    for i in 0..64 {
        swarm.write(&format!("a-files/tree/{i}"), 250 << 10, &format!("{i}"));
    }
    filled_meanwhile(&mut swarm, &mut disk, "tree/", fill);
}

#[test]
fn many_small_files_wait_for_inodes() {
    let mut swarm = Swarm::start();
    let options = format!("size={DISK},nr_inodes=500");
    let Some(mut disk) = SmallDisk::in_memory_with(&mut swarm, "sink", "downloads", &options)
    else {
        return skip("many small files on a disk without inodes: this user may not mount one");
    };
    for i in 0..64 {
        swarm.write(&format!("a-files/tree/{i}"), 250 << 10, &format!("{i}"));
    }
    filled_meanwhile(&mut swarm, &mut disk, "tree/", fill_with_files);
}

#[test]
fn a_sparse_image_needs_room_for_its_data_only() {
    const IMAGE: u64 = 2 * DISK + 77;
    let mut swarm = Swarm::start();
    let Some(mut disk) = SmallDisk::in_memory(&mut swarm, "sink", "downloads") else {
        return skip("a sparse image on a small disk: this user may not mount one");
    };
    swarm.write("a-files/image", MIB, "data");
    let image = File::options()
        .write(true)
        .open(swarm.path("a-files/image"))
        .unwrap();
    image.set_len(IMAGE).unwrap();
    swarm.sharing_peer("a", &[]);
    swarm.join("sink");
    swarm.start_peer("sink", &["--downloads", "downloads"]);
    swarm.wait_listed("sink", "image", 1);
    swarm.run("sink", ["get", "image"]).ok();
    let got = format!("{}/image", disk.folder);
    swarm.assert_same("a-files/image", &got);
    let blocks = fs::metadata(got).unwrap().blocks();
    assert!(blocks * 512 < 2 * MIB, "{blocks}");
    assert!(disk.holder.is_running());
}

#[test]
fn a_file_whose_space_cannot_be_reserved_waits_for_room() {
    let mut swarm = Swarm::start();
    let Some(mut disk) = SmallDisk::without_fallocate(&mut swarm, "sink") else {
        return skip("a disk without fallocate that fills up: needs root, mke2fs and loop devices");
    };
    swarm.write("a-files/film", 16 * MIB + 77, "film");
    filled_meanwhile(&mut swarm, &mut disk, "film", fill);
}
