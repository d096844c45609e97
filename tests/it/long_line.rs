//! A long line that several connections to one source fill: a megabit a second, 60 ms there and back, and a queue that holds
//! a quarter of a second. Whatever the packets that get lost do to this or that connection, few bytes come twice.

use std::process::{Child, Command, Stdio};

use crate::{
    namespaces::told_by_ip as ip,
    process::{PATIENCE, wait_until},
    swarm::{MIB, Swarm, skip},
};

/// Namespaces `NAME-a` and `NAME-b`, joined by the benchmark's stand-in for such a line; all gone when dropped.
struct LongLine {
    name: String,
    carrier: Option<Child>,
}

impl LongLine {
    /// None if this machine does not let us.
    fn new(swarm: &Swarm, [delay_us, mbit, queue_kib]: [&str; 3]) -> Option<Self> {
        let mut line = Self {
            name: format!("sprat-line{}", std::process::id()),
            carrier: None,
        };
        let (ends, program) = (["a", "b"].map(|end| line.of(end)), swarm.path("wanlink"));
        ends.iter()
            .try_for_each(|end| ip(&format!("netns add {end}")).map(drop))?;
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/wanlink.c");
        let made = Command::new("cc")
            .args(["-O2", "-o"])
            .arg(&program)
            .arg(source)
            .status();
        assert!(
            made.is_ok_and(|status| status.success()),
            "{source} compiles"
        );
        let carrier = Command::new(program)
            .args(&ends)
            .args([delay_us, mbit, "0", queue_kib])
            .stderr(Stdio::null())
            .spawn();
        line.carrier = Some(carrier.unwrap());
        for (i, end) in (1..).zip(&ends) {
            let carrier = line.carrier.as_mut()?;
            let is_up = || ip(&format!("-n {end} link show tw0")).is_some();
            let made = || (is_up() || carrier.try_wait().unwrap().is_some()).then(is_up);
            if !wait_until("the line is there, or cannot be made", PATIENCE, made) {
                return None;
            }
            ip(&format!("-n {end} addr add 10.76.0.{i}/24 dev tw0"))?;
            ip(&format!("-n {end} link set lo up"))?;
            ip(&format!("-n {end} link set tw0 mtu 1500 up"))?;
            // As most machines are; whoever has no cubic keeps what it has.
            let _ = ip(&format!(
                "netns exec {end} sysctl -qw net.ipv4.tcp_congestion_control=cubic"
            ));
        }
        Some(line)
    }

    fn of(&self, end: &str) -> String {
        format!("{}-{end}", self.name)
    }

    /// Bytes that have come to the far end.
    fn carried(&self) -> u64 {
        let shown = ip(&format!("-n {} -s -j link show tw0", self.of("b"))).unwrap();
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        shown[0]["stats64"]["rx"]["bytes"].as_u64().unwrap()
    }
}

impl Drop for LongLine {
    fn drop(&mut self) {
        if let Some(carrier) = &mut self.carrier {
            let _ = carrier.kill();
            let _ = carrier.wait();
        }
        ["a", "b"]
            .iter()
            .for_each(|end| _ = ip(&format!("netns del {}", self.of(end))));
    }
}

#[test]
fn connections_that_share_a_slow_line_do_not_fetch_one_anothers_pieces() {
    let mut swarm = Swarm::empty();
    let Some(line) = LongLine::new(&swarm, ["30000", "1", "32"]) else {
        return skip("a slow long line: needs root, the command ip and /dev/net/tun");
    };
    ["tracker", "source"]
        .iter()
        .for_each(|member| swarm.wrap(member, &["ip", "netns", "exec", &line.of("a")]));
    swarm.start_tracker(&["--listen", "10.76.0.1:0"]);
    swarm.write("film", MIB, "film");
    swarm.same("film", "source-files/film");
    swarm.sharing_peer("source", &["--listen", "10.76.0.1:0"]);
    // Three downloads together: a busy machine holds the line up at times, and then it is right to ask again.
    let sinks = ["first", "second", "third"];
    let mut crossed = vec![];
    for sink in sinks {
        swarm.wrap(sink, &["ip", "netns", "exec", &line.of("b")]);
        swarm.join(sink);
        swarm.wait_listed(sink, "film", 1);
        let (copy, before) = (format!("{sink}-copy"), line.carried());
        swarm.run(sink, ["get", "film", "-o", &copy]).ok();
        swarm.assert_same("film", &copy);
        crossed.push(line.carried() - before);
    }
    // With packet headers, handshakes, and a piece or two that were not whole when a connection was let go.
    let most = sinks.len() as u64 * MIB * 8 / 5;
    assert!(
        crossed.iter().sum::<u64>() <= most,
        "bytes that crossed the line, for {MIB} each time: {crossed:?}"
    );
}
