//! Compiles the protobuf files in pure Rust: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["worker.proto"], ["proto"])?;
    tonic_prost_build::configure().bytes(".baton.v1").compile_fds(files)?;
    Ok(())
}
