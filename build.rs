//! Compiles `proto/` without `protoc`, keeps payloads as `Bytes`, and writes the descriptor set that reflection serves.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files =
        ["types", "tracker", "enrollment", "chunk", "control", "admin"].map(|name| format!("sprat/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"])?;
    fs::write(PathBuf::from(env::var("OUT_DIR")?).join("sprat.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().build_transport(false).bytes(".sprat.v1").compile_fds(descriptors)?;
    Ok(())
}
