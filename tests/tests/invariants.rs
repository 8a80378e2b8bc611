//! What each part of the workspace may not know (ARCHITECTURE.md, "Invariants"), as far as a dependency shows it.
//!
//! Read from `cargo metadata` with the default features, for the machine at hand: what is checked is what is built.

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package, PackageId};
use std::collections::{BTreeMap, BTreeSet};

struct Workspace {
    metadata: Metadata,
}

impl Workspace {
    /// Asks cargo, without touching the network.
    fn read() -> Self {
        let host = option_env!("CARGO_BUILD_TARGET").map_or_else(host_triple, str::to_owned);
        let metadata = MetadataCommand::new()
            .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
            .other_options(["--locked", "--offline", "--filter-platform", &host].map(str::to_owned))
            .exec()
            .expect("cargo describes the workspace");
        Self { metadata }
    }

    fn package(&self, name: &str) -> &Package {
        let mut members = self.metadata.workspace_packages().into_iter();
        members.find(|package| package.name.as_str() == name).unwrap_or_else(|| panic!("no crate {name:?} here"))
    }

    /// Names the crates that `name`'s own manifest lists, dev-dependencies left out.
    fn direct(&self, name: &str) -> BTreeSet<String> {
        let listed = self.package(name).dependencies.iter();
        listed.filter(|dependency| dependency.kind != DependencyKind::Development).map(|d| d.name.clone()).collect()
    }

    /// Names every package that is compiled into `name` or runs while it is built, itself left out, and who asked for it.
    fn below(&self, name: &str) -> BTreeMap<String, String> {
        let resolve = self.metadata.resolve.as_ref().expect("metadata comes with its resolution");
        let nodes: BTreeMap<&PackageId, _> = resolve.nodes.iter().map(|node| (&node.id, node)).collect();
        let mut found = BTreeMap::new();
        let mut open = vec![&self.package(name).id];
        while let Some(id) = open.pop() {
            for dependency in &nodes[id].deps {
                let built = dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development);
                let package = self.metadata[&dependency.pkg].name.to_string();
                if built && found.insert(package, self.metadata[id].name.to_string()).is_none() {
                    open.push(&dependency.pkg);
                }
            }
        }
        found
    }

    fn members(&self) -> Vec<&Package> {
        self.metadata.workspace_packages()
    }
}

fn host_triple() -> String {
    let output = std::process::Command::new("rustc").arg("-vV").output().expect("rustc runs where cargo does");
    let text = String::from_utf8(output.stdout).expect("rustc prints text");
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.expect("rustc names its host").to_owned()
}

/// Checks that nothing below `of` is called one of `forbidden` (a trailing `*` stands for any ending).
fn check_absent(workspace: &Workspace, of: &str, forbidden: &[&str]) {
    let below = workspace.below(of);
    assert!(!below.is_empty(), "{of} depends on something");
    let matches = |name: &str, pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    };
    for (name, by) in &below {
        let hit = forbidden.iter().find(|pattern| matches(name, pattern));
        assert!(hit.is_none(), "{of} must not have {name} below it; {by} brings it in");
    }
}

#[test]
fn the_router_knows_no_tensors() {
    check_absent(
        &Workspace::read(),
        "router",
        &["engine", "candle*", "kv-transfer", "prefill-worker", "decode-worker"],
    );
}

#[test]
fn the_engine_knows_no_network() {
    let network = [
        "tokio*",
        "tonic*",
        "hyper*",
        "axum*",
        "h2",
        "mio",
        "proto",
        "cluster",
        "telemetry",
        "kv-transfer",
        "tokenizers",
    ];
    check_absent(&Workspace::read(), "engine", &network);
}

#[test]
fn kv_transfer_knows_no_model() {
    check_absent(&Workspace::read(), "kv-transfer", &["engine", "candle*", "safetensors", "tokenizers", "proto"]);
}

#[test]
fn kv_cache_is_pure() {
    let direct = Workspace::read().direct("kv-cache");
    assert_eq!(direct, ["blake3", "serde"].map(str::to_owned).into());
}

#[test]
fn placement_decides_and_does_nothing_else() {
    let workspace = Workspace::read();
    for name in ["placement", "admission", "timing"] {
        check_absent(&workspace, name, &["tokio*", "tonic*", "engine", "kv-transfer", "cluster", "rand"]);
    }
}

#[test]
fn workloads_are_pure() {
    check_absent(&Workspace::read(), "workload", &["tokio*", "hyper*", "router", "engine", "kv-cache", "proto"]);
}

#[test]
fn gguf_is_a_container_and_nothing_else() {
    let direct = Workspace::read().direct("gguf");
    assert_eq!(direct, ["thiserror"].map(str::to_owned).into());
}

/// Checks that of our crates only `allowed` list `dependency` in their manifest.
fn check_only(workspace: &Workspace, allowed: &str, dependency: &str) {
    let users: Vec<&str> = workspace.members().into_iter().map(|package| package.name.as_str()).collect();
    let users: Vec<&str> = users.into_iter().filter(|name| workspace.direct(name).contains(dependency)).collect();
    assert_eq!(users, [allowed], "{dependency} has one home");
}

#[test]
fn only_cluster_speaks_etcd() {
    check_only(&Workspace::read(), "cluster", "etcd-client");
}

#[test]
fn text_exists_only_in_the_router() {
    for dependency in ["tokenizers", "minijinja", "minijinja-contrib"] {
        check_only(&Workspace::read(), "router", dependency);
    }
}

#[test]
fn grammars_have_one_home() {
    check_only(&Workspace::read(), "grammar", "llguidance");
    check_absent(&Workspace::read(), "grammar", &["tokio*", "hyper*", "reqwest*", "tokenizers", "engine", "router"]);
}

#[test]
fn candle_is_a_reference_for_the_engines_tests_only() {
    let workspace = Workspace::read();
    check_absent(&workspace, "baton", &["candle*"]);
    for package in workspace.members() {
        let listed = package.dependencies.iter().any(|dependency| dependency.name == "candle-core");
        assert_eq!(listed, package.name.as_str() == "engine", "{}: candle-core has one home", package.name);
    }
}

#[test]
fn the_default_build_needs_a_c_compiler_only() {
    let workspace = Workspace::read();
    let system = [
        "cust*",
        "candle-kernels",
        "ucx1*",
        "async-ucx",
        "openssl*",
        "native-tls",
        "onig*",
        "libz-sys",
        "protobuf-src",
        "bindgen",
    ];
    check_absent(&workspace, "baton", &system);
    // Ours, and not the one that links UCX: the library is opened at run time, if it is there.
    let ucx = workspace.package("ucx-sys");
    let builds = ucx.targets.iter().any(|target| target.is_custom_build());
    assert!(ucx.source.is_none() && ucx.links.is_none() && !builds, "ucx-sys must build without UCX");
    // So are NVIDIA's libraries: nothing may ask the crate that calls them to link.
    let cudarc = &workspace.metadata.resolve.as_ref().expect("metadata comes with its resolution").nodes;
    let cudarc = cudarc.iter().find(|node| &*workspace.metadata[&node.id].name == "cudarc").expect("cudarc is used");
    let links = |feature: &&str| feature.ends_with("-linking") || feature.ends_with("-from-build-system");
    assert_eq!(cudarc.features.iter().map(|feature| &***feature).find(links), None, "cudarc must build without CUDA");
    // `links` names a native library. Who is listed here only uses the key to exist once in a build; ring (of rustls) and mimalloc bring
    // their own C and assembly, for which the C compiler is enough.
    let below = workspace.below("baton");
    let native: BTreeSet<_> = workspace
        .metadata
        .packages
        .iter()
        .filter(|package| below.contains_key(package.name.as_str()))
        .filter_map(|package| package.links.clone())
        .collect();
    assert_eq!(native, ["mimalloc", "prettyplease02", "rayon-core", "ring_core_0_17_14_"].map(str::to_owned).into());
}

#[test]
fn unsafe_code_has_two_homes() {
    for package in Workspace::read().members() {
        let library = package.targets.iter().find(|target| target.is_lib()).or_else(|| package.targets.first());
        let root = &library.expect("a crate has a target").src_path;
        let source = std::fs::read_to_string(root).expect("the crate's root can be read");
        let forbids = source.lines().any(|line| line == "#![forbid(unsafe_code)]");
        // `ucx-sys` is a part of kv-transfer's transport, with a crate of its own for what is C.
        let home = matches!(package.name.as_str(), "engine" | "kv-transfer" | "ucx-sys");
        assert_ne!(forbids, home, "{root}: `#![forbid(unsafe_code)]` belongs everywhere but in engine and kv-transfer");
    }
}

#[test]
fn every_version_stands_in_the_root_manifest() {
    for package in Workspace::read().members() {
        let manifest = std::fs::read_to_string(&package.manifest_path).expect("the manifest can be read");
        let manifest: toml::Table = manifest.parse().expect("cargo has read it too");
        for section in ["dependencies", "dev-dependencies"] {
            let listed = manifest.get(section).and_then(toml::Value::as_table).into_iter().flatten();
            for (name, value) in listed {
                let inherited = value.get("workspace").and_then(toml::Value::as_bool) == Some(true);
                assert!(inherited, "{}: {name} must say `workspace = true`", package.manifest_path);
            }
        }
    }
}

/// Fields of the API that a row of docs/openai.md speaks of, and the tests that it names.
fn rows(page: &str) -> Vec<(Vec<String>, Vec<String>)> {
    let names = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let mut rows: Vec<(Vec<String>, Vec<String>)> = Vec::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
        // Other tables are not about fields.
        if let [fields, _, _, _, tests] = cells[..] {
            let same = rows.last().filter(|_| tests.trim() == "the same").map(|(_, tests)| tests.clone());
            rows.push((names(fields), same.unwrap_or_else(|| names(tests))));
        }
    }
    rows
}

#[test]
fn every_field_of_the_api_has_a_test_that_speaks_of_it() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let rows = rows(&read("docs/openai.md"));
    assert!(rows.len() > 40, "{} rows were found", rows.len());
    for (fields, tests) in rows {
        let source = |test: &String| match test.contains('/') {
            true => read(test),
            false => read(&format!("router/tests/conversations/{test}.rs")),
        };
        let sources: Vec<String> = tests.iter().map(source).collect();
        for field in fields {
            let spoken = sources.iter().any(|source| source.contains(&field));
            assert!(spoken, "docs/openai.md says that `{field}` is tested in {tests:?}, and none of them speaks of it");
        }
    }
}
