//! A tracker with a certificate from the line that everybody knows, and the configuration file of the older tool.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
};

use serde_json::json;

use crate::{
    process::{PATIENCE, Process},
    swarm::{Swarm, free_port},
};

/// As it is typed everywhere.
const ONE_LINER: &str =
    "openssl req -x509 -newkey rsa:4096 -keyout key.pem -out cert.pem -days 365";
const PASSPHRASE: &str = "correct horse";

/// Types the line in the swarm's folder: the passphrase twice, and Enter to every question.
fn type_one_liner(swarm: &Swarm) {
    let mut script = Command::new("script");
    script
        .args(["--quiet", "--return", "--command", ONE_LINER, "/dev/null"])
        .current_dir(swarm.path(""));
    let mut terminal = Process::spawn(&mut script, &swarm.path(""), Some(Stdio::piped()));
    let mut keyboard = terminal.child().stdin.take().unwrap();
    // A question is answered when it is asked: a terminal forgets what was typed before its echo went off.
    for (question, answer) in [
        ("Enter PEM pass phrase:", PASSPHRASE),
        ("Verifying - Enter PEM pass phrase:", PASSPHRASE),
        ("Country Name", ""),
        ("State or Province Name", ""),
        ("Locality Name", ""),
        ("Organization Name", ""),
        ("Organizational Unit Name", ""),
        ("Common Name", ""),
        ("Email Address", ""),
    ] {
        crate::process::wait_until(question, PATIENCE, || {
            terminal.stdout().contains(question).then_some(())
        });
        writeln!(keyboard, "{answer}").unwrap();
    }
    drop(keyboard);
    terminal.finish(PATIENCE).ok();
    assert!(
        fs::read_to_string(swarm.path("key.pem"))
            .unwrap()
            .contains("BEGIN ENCRYPTED PRIVATE KEY")
    );
}

#[test]
fn the_one_liner_and_the_older_file_run_a_network() {
    let mut swarm = Swarm::empty();
    type_one_liner(&swarm);
    let port = free_port();
    let file = json!({
        "server": {"host": "127.0.0.1", "port": port, "certificate_path": "cert.pem", "key_path": "key.pem"},
        "client": {
            "server_host": "127.0.0.1", "server_port": port,
            "shared_files_directory": "shared", "downloads_directory": "downloads",
        },
    });
    fs::write(swarm.path("config.json"), file.to_string()).unwrap();
    fs::set_permissions(swarm.path("config.json"), fs::Permissions::from_mode(0o644)).unwrap();
    ["shared", "downloads"]
        .iter()
        .for_each(|name| fs::create_dir(swarm.path(name)).unwrap());

    // Nobody is asked where there is no terminal.
    swarm
        .run("tracker", ["tracker", "run"])
        .fails(2, &["key.pem", "SPRAT_KEY_PASSPHRASE"]);
    swarm.set("SPRAT_KEY_PASSPHRASE", "wrong");
    swarm
        .run("tracker", ["tracker", "run"])
        .fails(1, &["passphrase", "key.pem"]);
    swarm.set("SPRAT_KEY_PASSPHRASE", PASSPHRASE);
    swarm.start_tracker(&[]);
    assert_eq!(swarm.address(), format!("127.0.0.1:{port}"));
    let link = swarm.link(1);
    assert!(
        link.starts_with(&format!("sprat://127.0.0.1:{port}/t")),
        "{link}"
    );

    swarm.write("shared/film", 700_000, "film");
    swarm.join("a");
    swarm.start_peer("a", &[]);
    swarm.join("b");
    swarm.wait_listed("b", "film", 1);
    // Without -o: into the downloads folder of the file.
    swarm.run("b", ["get", "film"]).ok();
    swarm.assert_same("shared/film", "downloads/film");

    // The passphrase from a file; the members come back to the same tracker.
    swarm.kill("tracker");
    swarm.set("SPRAT_KEY_PASSPHRASE", "");
    fs::write(swarm.path("passphrase"), format!("{PASSPHRASE}\n")).unwrap();
    swarm.start_tracker(&["--key-passphrase-file", "passphrase"]);
    swarm.wait_listed("b", "film", 1);

    // Without its own certificate, then with it again: members trust both.
    swarm.kill("tracker");
    fs::remove_file(swarm.path("config.json")).unwrap();
    let listen = format!("127.0.0.1:{port}");
    swarm.start_tracker(&["--listen", &listen]);
    swarm.wait_listed("b", "film", 1);
    assert!(
        swarm
            .link(1)
            .starts_with(&format!("sprat://127.0.0.1:{port}/a"))
    );
}

#[test]
fn a_certificate_that_does_not_fit_is_named() {
    let swarm = Swarm::empty();
    let run = |args: &[&str]| {
        swarm.run(
            "tracker",
            [&["tracker", "run", "--listen", "127.0.0.1:0"], args].concat(),
        )
    };
    run(&["--certificate", "cert.pem", "--certificate-key", "key.pem"]).fails(1, &["key.pem"]);
    run(&["--certificate", "cert.pem"]).fails(2, &["--certificate-key"]);
    for (name, text) in [("cert.pem", "no certificate"), ("key.pem", "no key")] {
        fs::write(swarm.path(name), text).unwrap();
    }
    run(&["--certificate", "cert.pem", "--certificate-key", "key.pem"]).fails(1, &["pem"]);
}
