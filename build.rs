//! Compiles `proto/` without `protoc`, keeps payloads as `Bytes`, and writes the descriptor set that reflection serves and the
//! names of all methods.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "types",
        "tracker",
        "enrollment",
        "chunk",
        "control",
        "admin",
    ]
    .map(|name| format!("sprat/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("sprat.v1.bin"), descriptors.encode_to_vec())?;
    let services = descriptors
        .file
        .iter()
        .flat_map(|file| file.service.iter().map(|service| (file.package(), service)));
    let methods: Vec<_> = services
        .flat_map(|(package, service)| {
            service
                .method
                .iter()
                .map(move |method| format!("{package}.{}/{}", service.name(), method.name()))
        })
        .collect();
    fs::write(
        out.join("methods.rs"),
        format!("const METHODS: &[&str] = &{methods:?};\n"),
    )?;
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".sprat.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
