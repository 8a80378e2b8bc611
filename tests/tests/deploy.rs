//! The manifests, the image and the compose file fit together and fit the binary: runs deploy/tests with the Python that
//! `tests/servers/install.sh` made.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

#[test]
fn deploy_fits_together_and_fits_the_binary() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository");
    let python = root.join(".venv/bin/python");
    assert!(python.exists(), "{} is missing; run tests/servers/install.sh", python.display());
    let output = Command::new(python)
        .args(["-m", "unittest", "discover", "--verbose", "-s", "deploy/tests"])
        .current_dir(root)
        .env("BATON_BINARY", baton())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("Python starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Returns the binary built beside this test.
fn baton() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let binary = test.parent().and_then(Path::parent).expect("tests run from target/<profile>/deps").join("baton");
    assert!(binary.exists(), "{} is not built; run `cargo build -p baton` first", binary.display());
    binary
}
