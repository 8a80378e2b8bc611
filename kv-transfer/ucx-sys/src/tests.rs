use super::*;
use std::{
    collections::BTreeMap,
    mem::{offset_of, size_of},
    path::{Path, PathBuf},
    process::Command,
};

/// What this crate believes, by the names of `abi/probe.c`. Sizes without the slack.
fn believed() -> BTreeMap<&'static str, i64> {
    const SLACK_BYTES: usize = size_of::<[u64; SLACK]>();
    macro_rules! layouts {
        ($($c:literal $rust:ident { $($field:literal: $($at:ident).+),* })*) => {
            vec![$(
                (concat!("sizeof(", $c, ")"), (size_of::<$rust>() - SLACK_BYTES) as i64),
                $((concat!($c, ".", $field), offset_of!($rust, $($at).+) as i64),)*
            )*]
        };
    }
    let layouts = layouts! {
        "ucp_params_t" Params { "field_mask": field_mask, "features": features, "mt_workers_shared": mt_workers_shared, "name": name }
        "ucp_worker_params_t" WorkerParams {
            "field_mask": field_mask, "thread_mode": thread_mode, "cpu_mask": cpu_mask, "events": events, "flags": flags,
            "client_id": client_id
        }
        "ucp_worker_attr_t" WorkerAttr {
            "field_mask": field_mask, "address_flags": address_flags, "address": address, "address_length": address_length,
            "max_debug_string": max_debug_string
        }
        "ucp_mem_map_params_t" MemMapParams {
            "field_mask": field_mask, "address": address, "length": length, "flags": flags, "prot": prot, "memory_type": memory_type
        }
        "ucp_mem_attr_t" MemAttr { "field_mask": field_mask, "address": address, "length": length, "mem_type": mem_type }
        "ucp_ep_params_t" EpParams {
            "field_mask": field_mask, "address": address, "err_mode": err_mode, "err_handler": err_handler,
            "err_handler.cb": err_handler, "err_handler.arg": err_handler_arg, "user_data": user_data, "flags": flags,
            "local_sockaddr": local_sockaddr
        }
        "ucp_request_param_t" RequestParam {
            "op_attr_mask": op_attr_mask, "flags": flags, "request": request, "cb": cb, "datatype": datatype, "user_data": user_data,
            "memory_type": memory_type, "memh": memh
        }
    };
    let values = [
        ("sizeof(ucs_status_t)", size_of::<Status>() as i64),
        ("UCS_OK", OK.into()),
        ("UCS_INPROGRESS", INPROGRESS.into()),
        ("UCS_ERR_LAST", ERR_LAST as i64),
        // As matched in `load::heard`.
        ("UCS_LOG_LEVEL_ERROR", 1),
        ("UCS_LOG_LEVEL_WARN", 2),
        ("UCS_LOG_LEVEL_DIAG", 3),
        ("UCS_LOG_LEVEL_INFO", 4),
        ("UCS_LOG_LEVEL_DEBUG", 5),
        ("UCP_PARAM_FIELD_FEATURES", PARAM_FEATURES as i64),
        ("UCP_FEATURE_RMA", FEATURE_RMA as i64),
        ("UCP_FEATURE_WAKEUP", FEATURE_WAKEUP as i64),
        ("UCP_WORKER_PARAM_FIELD_THREAD_MODE", WORKER_PARAM_THREAD_MODE as i64),
        ("UCP_WORKER_PARAM_FIELD_FLAGS", WORKER_PARAM_FLAGS as i64),
        ("UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK", WORKER_IGNORE_REQUEST_LEAK as i64),
        ("UCS_THREAD_MODE_SINGLE", THREAD_MODE_SINGLE.into()),
        ("UCP_WORKER_ATTR_FIELD_ADDRESS", WORKER_ATTR_ADDRESS as i64),
        ("UCP_MEM_MAP_PARAM_FIELD_ADDRESS", MEM_MAP_PARAM_ADDRESS as i64),
        ("UCP_MEM_MAP_PARAM_FIELD_LENGTH", MEM_MAP_PARAM_LENGTH as i64),
        ("UCP_MEM_MAP_PARAM_FIELD_FLAGS", MEM_MAP_PARAM_FLAGS as i64),
        ("UCP_MEM_MAP_ALLOCATE", MEM_MAP_ALLOCATE.into()),
        ("UCP_MEM_ATTR_FIELD_ADDRESS", MEM_ATTR_ADDRESS as i64),
        ("UCP_EP_PARAM_FIELD_REMOTE_ADDRESS", EP_PARAM_REMOTE_ADDRESS as i64),
        ("UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE", EP_PARAM_ERR_MODE as i64),
        ("UCP_EP_PARAM_FIELD_ERR_HANDLER", EP_PARAM_ERR_HANDLER as i64),
        ("UCP_ERR_HANDLING_MODE_PEER", ERR_MODE_PEER.into()),
        ("UCP_OP_ATTR_FIELD_FLAGS", OP_FLAGS.into()),
        ("UCP_OP_ATTR_FIELD_MEMH", OP_MEMH.into()),
        ("UCP_OP_ATTR_FLAG_MULTI_SEND", OP_MULTI_SEND.into()),
        ("UCP_EP_CLOSE_FLAG_FORCE", EP_CLOSE_FORCE.into()),
    ];
    layouts.into_iter().chain(values).collect()
}

/// Compares one line of a version with what this crate believes.
fn check(version: &str, name: &str, value: i64, believed: &BTreeMap<&str, i64>) {
    let ours = *believed.get(name).unwrap_or_else(|| panic!("{name} is recorded but not declared here"));
    if name.starts_with("sizeof(ucp") {
        // A shorter struct of an old library reads less of ours; a longer one of a new library reads the slack.
        let most = ours + (SLACK * 8) as i64;
        assert!(value <= most, "{version}: {name} is {value}, ours with its slack {most}");
    } else {
        assert_eq!(value, ours, "{version}: {name}");
    }
}

#[test]
fn recorded_layouts() {
    let believed = believed();
    let table = include_str!("../abi/layouts.txt");
    let mut lines = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let versions = lines.next().expect("a heading");
    assert_eq!(versions[..2], ["version", "1.13.1"]);
    let mut seen = 0;
    for line in lines {
        for (version, value) in versions.iter().zip(&line).skip(1).filter(|(_, value)| **value != "-") {
            check(version, line[0], value.parse().expect("a number"), &believed);
        }
        seen += 1;
    }
    assert_eq!(seen, believed.len(), "every declaration is recorded");
}

/// The same against the headers of this machine, where there are any.
#[test]
fn layouts_of_the_headers_here() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [PathBuf::from("/usr/include"), here.join("../../.test-servers/ucx/include")];
    let Some(include) = folders.iter().find(|folder| folder.join("ucp/api/ucp.h").exists()) else {
        return eprintln!("skipped: no headers of UCX (tests/servers/install.sh) in {folders:?}");
    };
    let work = tempfile::tempdir().expect("temporary folder");
    let probe = work.path().join("probe");
    let built = Command::new("cc").arg("-I").arg(include).arg("-o").arg(&probe).arg(here.join("abi/probe.c")).status();
    assert!(built.expect("run cc").success(), "abi/probe.c does not compile with {include:?}");
    let printed = Command::new(probe).output().expect("run the probe").stdout;
    let believed = believed();
    let printed = String::from_utf8(printed).expect("text");
    assert!(printed.lines().count() > 50);
    for line in printed.lines() {
        let (name, value) = line.rsplit_once(' ').expect("name and value");
        check("headers here", name, value.parse().expect("a number"), &believed);
    }
}

#[test]
fn status_pointers() {
    let pointer = |address: isize| ptr::without_provenance_mut(address.cast_unsigned());
    assert_eq!(outcome(ptr::null_mut()), Ok(None));
    assert_eq!(outcome(pointer(-1)), Err(-1));
    assert_eq!(outcome(pointer(-100)), Err(-100));
    assert_eq!(outcome(pointer(-101)), Ok(ptr::NonNull::new(pointer(-101))));
}

/// One test, since a process loads one library.
#[test]
fn loading() {
    let error = load(Some(Path::new("/nowhere/libucp.so.0")), |_, _| {}).expect_err("there is none");
    let LoadError::Missing { library, reason } = &error else { panic!("{error:?}") };
    assert_eq!(library, "/nowhere/libucp.so.0");
    assert!(reason.contains("No such file"), "{reason}");
    // A library, but another.
    let error = load(Some(Path::new("libc.so.6")), |_, _| {}).expect_err("not UCX");
    assert!(matches!(&error, LoadError::Missing { reason, .. } if reason.contains("ucp_get_version")), "{error}");

    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.test-servers/ucx/lib/libucp.so.0");
    let path = installed.exists().then_some(installed);
    let handler = || {
        // SAFETY: all zeros is a `sigaction`; asks only.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGSEGV, ptr::null(), &mut action);
            action.sa_sigaction
        }
    };
    let before = handler();
    let api = match load(path.as_deref(), |_, _| {}) {
        Ok(api) => api,
        Err(error) => return eprintln!("skipped: no UCX here (tests/servers/install.sh): {error}"),
    };
    assert_eq!(handler(), before, "faults are still ours");
    assert!(api.at_least(API_VERSION), "{api:?}");
    assert!(ptr::eq(load(None, |_, _| {}).expect("the same again"), api));
    let another = load(Some(Path::new("/other/libucp.so.0")), |_, _| {}).expect_err("one is enough");
    assert!(matches!(another, LoadError::Another { .. }), "{another}");
}
