//! What can be had is had: a file that nobody serves, that is gone, changed or wrong costs nothing but itself, and is named
//! with the reason. A get of one file ends by that reason.

use std::fs;

use crate::{
    liar::{Liar, Lie, Truth},
    main_job::{slow_source, wait_progress},
    process::{Outcome, PATIENCE},
    swarm::{MIB, Swarm},
};

/// A get of everything, that does not wait for long.
fn get_all(swarm: &Swarm) -> Outcome {
    swarm.run(
        "sink",
        ["get", "**", "-o", "copy/", "--json", "--timeout", "4s"],
    )
}

/// So many files as `FOLDER/NUMBER`, whose names sort by number; gives the names.
fn write_files(swarm: &Swarm, folder: &str, n: u32, size: u64) -> Vec<String> {
    let names = (0..n).map(|i| format!("{i:02}"));
    names
        .inspect(|name| {
            swarm.write(&format!("{folder}/{name}"), size, name);
        })
        .collect()
}

/// Joins `sink` and waits until it sees so many names, of so many sources each.
fn join_sink(swarm: &Swarm, n_names: usize, n_sources: u64) {
    swarm.join("sink");
    swarm.wait_ls("sink", PATIENCE, |rows| {
        let has_all = rows.iter().all(|row| row["sources"] == n_sources);
        (has_all && rows.len() == n_names).then_some(())
    });
}

/// These and no others came, and they are right.
#[track_caller]
fn assert_came<'a>(swarm: &Swarm, folder: &str, names: impl IntoIterator<Item = &'a String>) {
    let names: Vec<_> = names.into_iter().cloned().collect();
    let mut came = swarm.files_in("copy");
    came.retain(|name| !name.contains(".part"));
    assert_eq!(came, names);
    for name in &names {
        swarm.assert_same(&format!("{folder}/{name}"), &format!("copy/{name}"));
    }
}

/// A member that registers these files of a folder, each with what it lies about it.
fn liar_with(
    swarm: &Swarm,
    folder: &str,
    names: &[String],
    lie: impl Fn(&str) -> Vec<Lie>,
) -> Liar {
    let offers = names.iter().map(|name| {
        let path = format!("{folder}/{name}");
        Truth::of(swarm, &path).offer(name, &lie(name))
    });
    Liar::serving(swarm, &swarm.link(1), offers.collect())
}

#[test]
fn a_source_that_calls_everything_out_of_range_costs_no_file() {
    for size in [100_000, 400_000] {
        let mut swarm = Swarm::start();
        let names = write_files(&swarm, "a-files", 40, size);
        let liar = liar_with(&swarm, "a-files", &names, |_| vec![Lie::OutOfRange]);
        swarm.sharing_peer("a", &["--upload-limit", "4MiB"]);
        join_sink(&swarm, names.len(), 2);
        let got = get_all(&swarm).ok();
        assert_eq!(got.summary()["files"], 40, "{got:#?}");
        assert!(liar.lied() > 0);
        assert_came(&swarm, "a-files", &names);
    }
}

#[test]
fn a_lone_source_that_calls_everything_out_of_range_is_not_asked_for_ever() {
    for size in [100_000, 400_000] {
        let swarm = Swarm::start();
        let names = write_files(&swarm, "files", 40, size);
        let liar = liar_with(&swarm, "files", &names, |_| vec![Lie::OutOfRange]);
        join_sink(&swarm, names.len(), 1);
        let got = get_all(&swarm);
        assert!(matches!(got.code, Some(4 | 6)), "{got:#?}");
        assert!(got.failed_files().keys().eq(&names), "{got:#?}");
        assert!(
            liar.lied() > 0 && liar.calls() < 50 * names.len(),
            "{} calls",
            liar.calls()
        );
    }
}

#[test]
fn rows_that_nobody_serves_stop_no_others() {
    let mut swarm = Swarm::start();
    let names = write_files(&swarm, "a-files", 30, 300_000);
    let lost = ["00 away", "00 gone", "20 away", "20 gone"];
    let offers = lost.map(|name| {
        swarm.write(name, 300_000, name);
        let lie = match name.ends_with("gone") {
            true => Lie::Unknown,
            false => Lie::Closed,
        };
        vec![Truth::of(&swarm, name).offer(name, &[lie])]
    });
    let _liars = Liar::all(&swarm, offers.into());
    swarm.sharing_peer("a", &[]);
    join_sink(&swarm, names.len() + lost.len(), 1);
    let away: &[&str] = &["unreachable"];
    get_all(&swarm).partly(&[
        (lost[0], away),
        (lost[1], &["gone"]),
        (lost[2], away),
        (lost[3], &["gone"]),
    ]);
    assert_came(&swarm, "a-files", &names);
    // People are told, too.
    let told = swarm.run("sink", ["get", "**", "-o", "copy/", "--timeout", "4s"]);
    told.fails(12, &lost);
}

#[test]
fn one_bad_file_among_twenty_costs_only_itself() {
    for size in [100_000, 400_000] {
        let swarm = Swarm::start();
        let names = write_files(&swarm, "files", 20, size);
        let bad = &names[7];
        let lies = |name: &str| (name == bad).then_some(Lie::Bytes).into_iter().collect();
        let _only_holder = liar_with(&swarm, "files", &names, lies);
        join_sink(&swarm, names.len(), 1);
        get_all(&swarm).partly(&[(bad, &["bad"])]);
        assert_came(&swarm, "files", names.iter().filter(|name| *name != bad));
    }
}

#[test]
fn files_that_are_deleted_at_the_source_meanwhile_are_named() {
    let mut swarm = Swarm::start();
    let names = write_files(&swarm, "a-files", 40, 500_000);
    swarm.sharing_peer("a", &["--upload-limit", "2MiB"]);
    join_sink(&swarm, names.len(), 1);
    let mut get = swarm.spawn(
        "sink",
        ["get", "**", "-o", "copy/", "--json", "--timeout", "8s"],
    );
    wait_progress(&mut get, 0.1);
    let came = swarm.files_in("copy");
    let mut deleted: Vec<_> = names.iter().filter(|name| !came.contains(name)).collect();
    deleted.truncate(deleted.len() / 2);
    for name in &deleted {
        fs::remove_file(swarm.path(&format!("a-files/{name}"))).unwrap();
    }
    let got = get.finish(PATIENCE);
    // Some were on their way.
    let failed = got.failed_files();
    assert!(
        !failed.is_empty() && failed.keys().all(|name| deleted.contains(&name)),
        "{failed:?}: {got:#?}"
    );
    let why: &[&str] = &["gone", "changed"];
    let told: Vec<_> = failed.keys().map(|name| (name.as_str(), why)).collect();
    got.partly(&told);
    let came = swarm.files_in("copy");
    for name in names.iter().filter(|name| !failed.contains_key(*name)) {
        assert!(came.contains(name), "{name} did not come: {came:?}");
    }
}

#[test]
fn a_file_that_is_replaced_at_the_source_meanwhile_has_changed() {
    let mut swarm = Swarm::start();
    swarm.write("film", 24 * MIB, "film");
    let (_, _link) = slow_source(&mut swarm, "a", 6 * MIB);
    swarm.write("other", 24 * MIB, "another");
    swarm.join("sink");
    let film = "movies/film.mkv";
    swarm.wait_listed("sink", film, 1);
    let mut get = swarm.spawn(
        "sink",
        ["get", film, "-o", "copy", "--json", "--timeout", "8s"],
    );
    wait_progress(&mut get, 0.1);
    fs::rename(swarm.path("other"), swarm.path("a-files").join(film)).unwrap();
    let got = get.finish(PATIENCE).fails(4, &["changed"]);
    let failed = got.failed_files();
    assert_eq!(
        failed.get(film).map(String::as_str),
        Some("changed"),
        "{got:#?}"
    );
    assert!(!swarm.path("copy").exists());
}

#[test]
fn one_file_alone_ends_by_its_reason() {
    let swarm = Swarm::start();
    let reasons = [
        (Lie::Closed, 4, "unreachable"),
        (Lie::Deaf, 4, "unreachable"),
        (Lie::Unknown, 4, "gone"),
        (Lie::Bytes, 6, "bad"),
        (Lie::Hash, 6, "bad"),
    ];
    let name = |lie: Lie| format!("{lie:?}");
    let offers = reasons.map(|(lie, ..)| {
        swarm.write(&name(lie), 300_000, &name(lie));
        vec![Truth::of(&swarm, &name(lie)).offer(&name(lie), &[lie])]
    });
    let _liars = Liar::all(&swarm, offers.into());
    join_sink(&swarm, reasons.len(), 1);
    for (lie, code, reason) in reasons {
        let name = name(lie);
        let got = swarm
            .run(
                "sink",
                ["get", &name, "-o", "copy", "--json", "--timeout", "4s"],
            )
            .fails(code, &[]);
        assert_eq!(
            got.failed_files().get(&name).map(String::as_str),
            Some(reason),
            "{got:#?}"
        );
        assert!(!swarm.path("copy").exists());
    }
}

#[test]
fn a_different_file_in_the_way_stops_no_others() {
    let mut swarm = Swarm::start();
    let names = write_files(&swarm, "a-files", 5, 300_000);
    swarm.sharing_peer("a", &[]);
    join_sink(&swarm, names.len(), 1);
    fs::create_dir(swarm.path("copy")).unwrap();
    fs::write(swarm.path("copy/02"), "mine").unwrap();
    fs::create_dir(swarm.path("copy/03")).unwrap();
    get_all(&swarm).partly(&[("02", &["exists"]), ("03", &["exists"])]);
    assert_eq!(fs::read(swarm.path("copy/02")).unwrap(), b"mine");
    for name in ["00", "01", "04"] {
        swarm.assert_same(&format!("a-files/{name}"), &format!("copy/{name}"));
    }
}

#[test]
fn a_name_that_is_a_folder_in_another_stops_no_others() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/x", 300_000, "x");
    swarm.write("a-files/z", 300_000, "z");
    swarm.write("b-files/x/y", 300_000, "y");
    swarm.sharing_peer("a", &[]);
    swarm.sharing_peer("b", &[]);
    join_sink(&swarm, 3, 1);
    let got = get_all(&swarm);
    assert_eq!(got.code, Some(12), "{got:#?}");
    let failed = got.failed_files();
    assert!(
        failed.len() == 1 && failed.keys().all(|name| name.starts_with('x')),
        "{failed:?}"
    );
    swarm.assert_same("a-files/z", "copy/z");
}
