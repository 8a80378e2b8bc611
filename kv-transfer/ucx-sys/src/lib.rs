//! The part of UCX's C interface (`ucp/api/ucp.h`) that Baton uses, written by hand and loaded at run time.
//!
//! Nothing is linked and nothing is needed to build: [`load`] opens `libucp.so.0`, and a machine without it gets an error value.
//! The layouts are those of UCX 1.13, which every later version only appends to (`abi/layouts.txt` records 1.13 to 1.22, and
//! `abi/record.sh` how it was made). What bindings must get right:
//!
//! - `ucs_status_t` is a packed enum: one byte.
//! - A status pointer is null (done), one of the last hundred addresses (an error) or a request.
//! - `ucp_init` is no symbol; [`Api::ucp_init_version`] is told [`API_VERSION`].
//! - Structs are zeroed, only fields named in their mask are read, and [`SLACK`] zeros follow, so that a newer library which
//!   copies its own, longer struct finds zeros.
//! - Unknown mask bits are ignored silently, so what is newer than [`API_VERSION`] would have to be gated on [`Api::version`].
//!   Nothing is yet: lists of addresses in one put (`UCP_DATATYPE_SGL`, since 1.22) want an RDMA device to show what they save.
//! - Signal handlers that the library installs when it is loaded are taken back, and it is never unloaded (it patches `mmap`).

mod load;

pub use load::{Level, LoadError, enter, load};

use libc::{FILE, c_char, c_int, c_uint, c_void, size_t};
use libloading::os::unix::Library;
use std::{fmt, ptr};

/// The oldest version that is taken: 1.13 aborts a process whose peer dies while they connect.
pub const API_VERSION: (u32, u32) = (1, 14);
/// Zero words after each struct that the library may copy whole.
const SLACK: usize = 8;

/// `ucs_status_t`: one byte.
pub type Status = i8;
/// `ucs_status_ptr_t`; see [`outcome`].
pub type StatusPtr = *mut c_void;
/// `ucp_context_h`.
pub type Context = *mut c_void;
/// `ucp_worker_h`.
pub type Worker = *mut c_void;
/// `ucp_ep_h`.
pub type Ep = *mut c_void;
/// `ucp_mem_h`.
pub type MemH = *mut c_void;
/// `ucp_rkey_h`.
pub type Rkey = *mut c_void;
/// `ucp_config_t *`.
pub type Config = *mut c_void;

pub const OK: Status = 0;
pub const INPROGRESS: Status = 1;
const ERR_LAST: isize = -100;

pub const PARAM_FEATURES: u64 = 1;
pub const FEATURE_RMA: u64 = 1 << 1;
pub const FEATURE_WAKEUP: u64 = 1 << 4;
pub const WORKER_PARAM_THREAD_MODE: u64 = 1;
pub const WORKER_PARAM_FLAGS: u64 = 1 << 5;
/// Says nothing of requests that are left when a worker is destroyed.
pub const WORKER_IGNORE_REQUEST_LEAK: u64 = 1;
pub const THREAD_MODE_SINGLE: u32 = 0;
pub const WORKER_ATTR_ADDRESS: u64 = 1 << 1;
pub const MEM_MAP_PARAM_ADDRESS: u64 = 1;
pub const MEM_MAP_PARAM_LENGTH: u64 = 1 << 1;
pub const MEM_MAP_PARAM_FLAGS: u64 = 1 << 2;
pub const MEM_MAP_ALLOCATE: u32 = 1 << 1;
pub const MEM_ATTR_ADDRESS: u64 = 1;
pub const EP_PARAM_REMOTE_ADDRESS: u64 = 1;
pub const EP_PARAM_ERR_MODE: u64 = 1 << 1;
pub const EP_PARAM_ERR_HANDLER: u64 = 1 << 2;
/// Without it the death of a peer aborts this process.
pub const ERR_MODE_PEER: u32 = 1;
pub const OP_FLAGS: u32 = 1 << 4;
pub const OP_MEMH: u32 = 1 << 8;
/// Not a field: an option that shares the mask's word.
pub const OP_MULTI_SEND: u32 = 1 << 19;
pub const EP_CLOSE_FORCE: u32 = 1;

/// Declares structs whose default is all zeros.
macro_rules! structs {
    ($($(#[$doc:meta])* pub struct $name:ident { $(pub $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name {
            $(pub $field: $type,)*
            #[doc(hidden)]
            pub _slack: [u64; SLACK],
        }

        impl Default for $name {
            fn default() -> Self {
                // SAFETY: integers, raw pointers and optional functions, for all of which zero is a value.
                unsafe { std::mem::zeroed() }
            }
        }
    )*};
}

structs! {
    /// `ucp_params_t`.
    pub struct Params {
        pub field_mask: u64,
        pub features: u64,
        pub request_size: size_t,
        pub request_init: *const c_void,
        pub request_cleanup: *const c_void,
        pub tag_sender_mask: u64,
        pub mt_workers_shared: c_int,
        pub estimated_num_eps: size_t,
        pub estimated_num_ppn: size_t,
        pub name: *const c_char,
    }
    /// `ucp_worker_params_t`.
    pub struct WorkerParams {
        pub field_mask: u64,
        pub thread_mode: c_uint,
        pub cpu_mask: [u64; 16],
        pub events: c_uint,
        pub user_data: *mut c_void,
        pub event_fd: c_int,
        pub flags: u64,
        pub name: *const c_char,
        pub am_alignment: size_t,
        pub client_id: u64,
    }
    /// `ucp_worker_attr_t`.
    pub struct WorkerAttr {
        pub field_mask: u64,
        pub thread_mode: c_uint,
        pub address_flags: u32,
        pub address: *mut c_void,
        pub address_length: size_t,
        pub max_am_header: size_t,
        pub name: [u8; 32],
        pub max_debug_string: size_t,
    }
    /// `ucp_mem_map_params_t`.
    pub struct MemMapParams {
        pub field_mask: u64,
        pub address: *mut c_void,
        pub length: size_t,
        pub flags: c_uint,
        pub prot: c_uint,
        pub memory_type: c_uint,
    }
    /// `ucp_mem_attr_t`.
    pub struct MemAttr {
        pub field_mask: u64,
        pub address: *mut c_void,
        pub length: size_t,
        pub mem_type: c_uint,
    }
    /// `ucp_ep_params_t`.
    pub struct EpParams {
        pub field_mask: u64,
        pub address: *const c_void,
        pub err_mode: c_uint,
        pub err_handler: Option<ErrHandler>,
        pub err_handler_arg: *mut c_void,
        pub user_data: *mut c_void,
        pub flags: c_uint,
        pub sockaddr: SockAddr,
        pub conn_request: *mut c_void,
        pub name: *const c_char,
        pub local_sockaddr: SockAddr,
    }
    /// `ucp_request_param_t`.
    pub struct RequestParam {
        pub op_attr_mask: u32,
        pub flags: u32,
        pub request: *mut c_void,
        pub cb: *const c_void,
        pub datatype: u64,
        pub user_data: *mut c_void,
        pub reply_buffer: *mut c_void,
        pub memory_type: c_uint,
        pub recv_info: *mut c_void,
        pub memh: MemH,
    }
}

/// `ucs_sock_addr_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SockAddr {
    pub address: *const c_void,
    pub length: u32,
}

/// `ucp_err_handler_cb_t`: called while the worker makes progress, when an endpoint has failed.
pub type ErrHandler = unsafe extern "C" fn(arg: *mut c_void, ep: Ep, status: Status);

/// Declares the functions and how each is found.
macro_rules! functions {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions of one loaded library.
        pub struct Api {
            $(pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            version: (u32, u32, u32),
            path: String,
        }

        impl Api {
            /// Finds the functions in `ucp`, opened from `path`, or in what it needs.
            ///
            /// # Safety
            /// The library is UCX's and is never unloaded.
            unsafe fn find(ucp: &Library, path: String) -> Result<Self, libloading::Error> {
                // SAFETY: the signatures are those of `ucp.h`, checked against its text by `abi/probe.c` as far as layouts go.
                unsafe {
                    Ok(Self {
                        $($name: *ucp.get(concat!(stringify!($name), "\0").as_bytes())?,)*
                        version: (0, 0, 0),
                        path,
                    })
                }
            }
        }
    };
}

functions! {
    ucp_get_version(*mut c_uint, *mut c_uint, *mut c_uint);
    ucp_init_version(c_uint, c_uint, *const Params, Config, *mut Context) -> Status;
    ucp_cleanup(Context);
    ucp_config_read(*const c_char, *const c_char, *mut Config) -> Status;
    ucp_config_modify(Config, *const c_char, *const c_char) -> Status;
    ucp_config_release(Config);
    ucp_context_print_info(Context, *mut FILE);
    ucp_worker_create(Context, *const WorkerParams, *mut Worker) -> Status;
    ucp_worker_destroy(Worker);
    ucp_worker_query(Worker, *mut WorkerAttr) -> Status;
    ucp_worker_release_address(Worker, *mut c_void);
    ucp_worker_progress(Worker) -> c_uint;
    ucp_worker_get_efd(Worker, *mut c_int) -> Status;
    ucp_worker_arm(Worker) -> Status;
    ucp_mem_map(Context, *const MemMapParams, *mut MemH) -> Status;
    ucp_mem_unmap(Context, MemH) -> Status;
    ucp_mem_query(MemH, *mut MemAttr) -> Status;
    ucp_rkey_pack(Context, MemH, *mut *mut c_void, *mut size_t) -> Status;
    ucp_rkey_buffer_release(*mut c_void);
    ucp_ep_create(Worker, *const EpParams, *mut Ep) -> Status;
    ucp_ep_rkey_unpack(Ep, *const c_void, *mut Rkey) -> Status;
    ucp_ep_flush_nbx(Ep, *const RequestParam) -> StatusPtr;
    ucp_ep_close_nbx(Ep, *const RequestParam) -> StatusPtr;
    ucp_ep_print_info(Ep, *mut FILE);
    ucp_rkey_ptr(Rkey, u64, *mut *mut c_void) -> Status;
    ucp_rkey_destroy(Rkey);
    ucp_get_nbx(Ep, *mut c_void, size_t, u64, Rkey, *const RequestParam) -> StatusPtr;
    ucp_put_nbx(Ep, *const c_void, size_t, u64, Rkey, *const RequestParam) -> StatusPtr;
    ucp_request_check_status(*mut c_void) -> Status;
    ucp_request_free(*mut c_void);
    ucs_status_string(Status) -> *const c_char;
}

impl Api {
    /// Returns the library's version: major, minor, release.
    pub fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    /// Returns what was opened.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Says whether the library is at least this.
    pub fn at_least(&self, (major, minor): (u32, u32)) -> bool {
        (self.version.0, self.version.1) >= (major, minor)
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("path", &self.path).field("version", &self.version).finish_non_exhaustive()
    }
}

/// Tells what a status pointer is: done at once, under way as a request, or an error.
pub fn outcome(pointer: StatusPtr) -> Result<Option<ptr::NonNull<c_void>>, Status> {
    let address = pointer.addr();
    if address >= ERR_LAST.cast_unsigned() {
        // The low byte of the address is the status.
        return Err(address as Status);
    }
    Ok(ptr::NonNull::new(pointer))
}

#[cfg(test)]
mod tests;
