//! NVIDIA's cuBLASLt: products of matrices for the card at hand, with the instructions that ours have not (`wgmma`, `tcgen05`, eight bits).
//!
//! The library is opened where bits may depend on the batch ([`crate::Config::exact`]); here and not by cudarc, which knows of no file that a user names.
//! How a product is computed is asked once for its shape and the power of two above its rows, and kept: so steps of a shape have the same bits, no step
//! waits for the library's search, and nothing is allocated in one.
//!
//! The library counts matrices by columns. To it `weights`, `[outputs][inputs]` in rows, is a matrix of `inputs` by `outputs`, transposed; `input` one of
//! `inputs` by `rows`; and what comes out one of `outputs` by `rows`. That is also the one form in which it has products of eight bits. Their scales are
//! left to `products.cu`: in the library those of rows are newer than CUDA 12.0.
//!
//! Meaning of the functions: NVIDIA, *cuBLAS*, section "Using the cuBLASLt API"; their types are those of its header since CUDA 11.

use super::{
    device::{Operand, Product, ProductShape},
    kernels::Element,
    library,
};
use cudarc::{
    cublaslt::sys::{
        cublasComputeType_t as Compute, cublasLtHandle_t as Handle, cublasLtMatmulAlgo_t as Algorithm,
        cublasLtMatmulDesc_t as Description, cublasLtMatmulDescAttributes_t as DescriptionAttribute,
        cublasLtMatmulPreference_t as Preference, cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute,
        cublasLtMatrixLayout_t as Layout, cublasLtMatrixLayoutAttribute_t as LayoutAttribute, cublasStatus_t as Status,
        cudaDataType_t as Type,
    },
    driver::sys::CUstream,
};
use libloading::Library;
use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_void},
    mem::MaybeUninit,
    path::{Path, PathBuf},
    ptr::{from_ref, null_mut},
};

/// Names under which the system's loader may know it, newest first, and where toolkits put it. The first needs a driver that knows CUDA 13.
const PLACES: [&str; 4] =
    ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "/usr/local/cuda/lib64/libcublasLt.so"];
/// Oldest version, as it counts: 12.0.
const OLDEST: usize = 120_000;
/// `CUBLAS_OP_T`.
const TRANSPOSED: c_int = 1;
const SUCCESS: c_int = Status::CUBLAS_STATUS_SUCCESS as c_int;
/// What a way is refused with that does not fit.
const UNFIT: [c_int; 2] = [Status::CUBLAS_STATUS_NOT_SUPPORTED as c_int, Status::CUBLAS_STATUS_INVALID_VALUE as c_int];

type Set<T> = unsafe extern "C" fn(T, c_int, *const c_void, usize) -> c_int;
type Destroy<T> = unsafe extern "C" fn(T) -> c_int;

/// The functions in use. All but the first two return 0 when they succeed; numbers of theirs are no enumerations here, for a library may know more.
#[derive(Debug)]
struct Functions {
    version: unsafe extern "C" fn() -> usize,
    text: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(*mut Handle) -> c_int,
    destroy: Destroy<Handle>,
    make_description: unsafe extern "C" fn(*mut Description, c_int, c_int) -> c_int,
    set_description: Set<Description>,
    destroy_description: Destroy<Description>,
    make_layout: unsafe extern "C" fn(*mut Layout, c_int, u64, u64, i64) -> c_int,
    set_layout: Set<Layout>,
    destroy_layout: Destroy<Layout>,
    make_preference: unsafe extern "C" fn(*mut Preference) -> c_int,
    set_preference: Set<Preference>,
    destroy_preference: Destroy<Preference>,
    choose: unsafe extern "C" fn(
        Handle,
        Description,
        Layout,
        Layout,
        Layout,
        Layout,
        Preference,
        c_int,
        *mut Choice,
        *mut c_int,
    ) -> c_int,
    multiply: unsafe extern "C" fn(
        Handle,
        Description,
        *const c_void,
        *const c_void,
        Layout,
        *const c_void,
        Layout,
        *const c_void,
        *const c_void,
        Layout,
        *mut c_void,
        Layout,
        *const Algorithm,
        *mut c_void,
        usize,
        CUstream,
    ) -> c_int,
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
struct Choice {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

impl Functions {
    fn of(library: &Library) -> Result<Self, libloading::Error> {
        // SAFETY: these are their types.
        unsafe {
            Ok(Self {
                version: library::function(library, c"cublasLtGetVersion")?,
                text: library::function(library, c"cublasLtGetStatusString")?,
                create: library::function(library, c"cublasLtCreate")?,
                destroy: library::function(library, c"cublasLtDestroy")?,
                make_description: library::function(library, c"cublasLtMatmulDescCreate")?,
                set_description: library::function(library, c"cublasLtMatmulDescSetAttribute")?,
                destroy_description: library::function(library, c"cublasLtMatmulDescDestroy")?,
                make_layout: library::function(library, c"cublasLtMatrixLayoutCreate")?,
                set_layout: library::function(library, c"cublasLtMatrixLayoutSetAttribute")?,
                destroy_layout: library::function(library, c"cublasLtMatrixLayoutDestroy")?,
                make_preference: library::function(library, c"cublasLtMatmulPreferenceCreate")?,
                set_preference: library::function(library, c"cublasLtMatmulPreferenceSetAttribute")?,
                destroy_preference: library::function(library, c"cublasLtMatmulPreferenceDestroy")?,
                choose: library::function(library, c"cublasLtMatmulAlgoGetHeuristic")?,
                multiply: library::function(library, c"cublasLtMatmul")?,
            })
        }
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: cuBLASLt returns a text that lives as long as the library.
        let text = unsafe { CStr::from_ptr((self.text)(code)) };
        Err(format!("cuBLASLt: {} (CUBLASLT_LOG_LEVEL=1 says more)", text.to_string_lossy()))
    }
}

/// An open cuBLASLt for the card whose context is current, which it is whenever this is used.
#[derive(Debug)]
pub(super) struct CublasLt {
    functions: Functions,
    handle: Handle,
    preference: Preference,
    /// By shape and the power of two above the rows; `None` where there is no way.
    ways: HashMap<(ProductShape, u32), Option<Way>>,
    /// Keeps the functions where they are.
    _library: Library,
}

/// How products of a shape are computed. What is null was not made yet.
#[derive(Debug)]
struct Way {
    description: Description,
    weights: Layout,
    input: Layout,
    sums: Layout,
    algorithm: Algorithm,
}

/// Opens the library `file`, or the one that is found for a driver that knows CUDA `driver`, as it counts. Returns where it was, and its version, too.
fn open(file: Option<&Path>, driver: c_int) -> Result<(Library, Functions, PathBuf, usize), String> {
    let places = if driver < 13_000 { &PLACES[1..] } else { &PLACES };
    let (library, place) = library::open("cuBLASLt", file, places).map_err(|problem| {
        format!("{problem}: it comes with CUDA's toolkit, or with PyPI's nvidia-cublas-cu12 or nvidia-cublas (--cublaslt-library)")
    })?;
    let functions =
        Functions::of(&library).map_err(|error| format!("{}: {}", place.display(), library::describe(&error)))?;
    // SAFETY: it may be asked at any time.
    let version = unsafe { (functions.version)() };
    if version < OLDEST {
        let place = place.display();
        return Err(format!("{place} is cuBLASLt of version {version}, and {OLDEST} (CUDA 12.0) or newer is needed"));
    }
    Ok((library, functions, place, version))
}

/// Looks for the library, and says which it is.
///
/// # Errors
/// Says what is missing and where it comes from.
pub(super) fn find(file: Option<&Path>) -> Result<String, String> {
    open(file, c_int::MAX).map(|(_, _, place, version)| format!("{version} ({})", place.display()))
}

impl CublasLt {
    /// Opens the library `file`, or the one that is found for a driver that knows CUDA `driver`, as it counts. It may use `workspace` bytes.
    ///
    /// # Errors
    /// Says what is missing and where it comes from.
    pub(super) fn open(file: Option<&Path>, driver: c_int, workspace: usize) -> Result<Self, String> {
        let (library, functions, place, version) = open(file, driver)?;
        let mut opened =
            Self { functions, handle: null_mut(), preference: null_mut(), ways: HashMap::new(), _library: library };
        // SAFETY: the card's context is current; both are ours to write, and given back with this value.
        unsafe {
            opened.functions.check((opened.functions.create)(&mut opened.handle)).map_err(|problem| {
                format!(
                    "{}: {problem}; version {version} for a driver that knows CUDA {}.{}",
                    place.display(),
                    driver / 1000,
                    driver % 1000 / 10
                )
            })?;
            opened.functions.check((opened.functions.make_preference)(&mut opened.preference))?;
            let most = PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as c_int;
            opened.set(opened.functions.set_preference, opened.preference, most, &(workspace as u64))?;
        }
        Ok(opened)
    }

    /// Chooses how products of such a shape and as many rows, rounded up, are computed; returns whether there is a way.
    pub(super) fn prepare(&mut self, product: &Product) -> Result<bool, String> {
        let key = (product.shape, product.row_class());
        if !self.ways.contains_key(&key) {
            let mut way = Way {
                description: null_mut(),
                weights: null_mut(),
                input: null_mut(),
                sums: null_mut(),
                algorithm: Algorithm { data: [0; 8] },
            };
            let found = self.describe(&mut way, product).and_then(|()| self.choose(&mut way));
            let way = if let Ok(true) = found {
                Some(way)
            } else {
                self.give_back(&way);
                None
            };
            found?;
            self.ways.insert(key, way);
        }
        Ok(self.ways[&key].is_some())
    }

    /// Asks `stream` to multiply what was prepared.
    ///
    /// # Safety
    /// The product's memory lies in the card's, as long as a product documents it, until the stream has passed this.
    pub(super) unsafe fn multiply(&mut self, product: &Product, stream: CUstream) -> Result<(), String> {
        let Some(Some(way)) = self.ways.get(&(product.shape, product.row_class())) else {
            unreachable!("{product:?} was not made ready");
        };
        for layout in [way.input, way.sums] {
            self.set_columns(layout, u64::from(product.rows))?;
        }
        // SAFETY: passed on.
        let mut code = unsafe { self.run(way, product, stream) };
        if UNFIT.contains(&code) {
            // What is right for the class is not for so many rows.
            let mut own = Way { ..*way };
            if self.choose(&mut own)? {
                // SAFETY: as above.
                code = unsafe { self.run(&own, product, stream) };
            }
        }
        self.functions.check(code)
    }

    /// # Safety
    /// As [`CublasLt::multiply`].
    unsafe fn run(&self, way: &Way, product: &Product, stream: CUstream) -> c_int {
        let Product { shape, weights, input, to, workspace, .. } = *product;
        let (floats, integers) = ([1.0, f32::from(u8::from(shape.adds))], [1, i32::from(shape.adds)]);
        let [alpha, beta]: [*const c_void; 2] = match shape.operand {
            Operand::Floats(_) | Operand::E4m3 => [0, 1].map(|at| from_ref(&floats[at]).cast()),
            Operand::Int8 => [0, 1].map(|at| from_ref(&integers[at]).cast()),
        };
        let (weights, input, to) = (weights as *const c_void, input as *const c_void, to as *mut c_void);
        let room = workspace.address as *mut c_void;
        // SAFETY: handle and descriptors are alive, and describe memory that is there, as promised; factors are read before this returns.
        unsafe {
            (self.functions.multiply)(
                self.handle,
                way.description,
                alpha,
                weights,
                way.weights,
                input,
                way.input,
                beta,
                to,
                way.sums,
                to,
                way.sums,
                &way.algorithm,
                room,
                workspace.bytes,
                stream,
            )
        }
    }

    /// Describes products of the class of `product` to the library.
    fn describe(&self, way: &mut Way, product: &Product) -> Result<(), String> {
        let (shape, rows) = (product.shape, u64::from(product.row_class()));
        let (operand, sums, compute) = match shape.operand {
            Operand::Floats(Element::Bf16) => (Type::CUDA_R_16BF, Type::CUDA_R_32F, Compute::CUBLAS_COMPUTE_32F),
            Operand::Floats(Element::F16) => (Type::CUDA_R_16F, Type::CUDA_R_32F, Compute::CUBLAS_COMPUTE_32F),
            Operand::E4m3 => (Type::CUDA_R_8F_E4M3, Type::CUDA_R_32F, Compute::CUBLAS_COMPUTE_32F),
            Operand::Int8 => (Type::CUDA_R_8I, Type::CUDA_R_32I, Compute::CUBLAS_COMPUTE_32I),
        };
        let (outputs, inputs) = (u64::from(shape.outputs), u64::from(shape.inputs));
        let functions = &self.functions;
        let layout = |to: &mut Layout, of: Type, rows: u64, columns: u64, stride: u64| {
            // SAFETY: the descriptor is ours to write, and given back with the way.
            functions.check(unsafe { (functions.make_layout)(to, of as c_int, rows, columns, stride as i64) })
        };
        layout(&mut way.weights, operand, inputs, outputs, inputs)?;
        layout(&mut way.input, operand, inputs, rows, u64::from(shape.input_stride))?;
        layout(&mut way.sums, sums, outputs, rows, u64::from(shape.to_stride))?;
        // SAFETY: likewise; attributes have these types.
        unsafe {
            functions.check((functions.make_description)(&mut way.description, compute as c_int, sums as c_int))?;
            let attribute = DescriptionAttribute::CUBLASLT_MATMUL_DESC_TRANSA as c_int;
            self.set(functions.set_description, way.description, attribute, &TRANSPOSED)?;
            if shape.operand == Operand::E4m3 {
                // Sums stay in the tensor cores, with fewer bits than f32 on sm_90; else every few products are added outside of them.
                let attribute = DescriptionAttribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM as c_int;
                self.set(functions.set_description, way.description, attribute, &1i8)?;
            }
        }
        Ok(())
    }

    /// Asks the library for the way that it thinks best; returns whether there is one.
    fn choose(&self, way: &mut Way) -> Result<bool, String> {
        let (mut best, mut count) = (MaybeUninit::<Choice>::zeroed(), 0);
        let Way { description, weights, input, sums, .. } = *way;
        // SAFETY: all descriptors are alive; there is room for one answer.
        let code = unsafe {
            let best = best.as_mut_ptr();
            let (handle, preference) = (self.handle, self.preference);
            (self.functions.choose)(handle, description, weights, input, sums, sums, preference, 1, best, &mut count)
        };
        if UNFIT.contains(&code) {
            return Ok(false);
        }
        self.functions.check(code)?;
        // SAFETY: it is zeros, which are a choice, or what the library wrote.
        let best = unsafe { best.assume_init() };
        way.algorithm = best.algorithm;
        Ok(count > 0 && best.state == SUCCESS)
    }

    fn set_columns(&self, layout: Layout, columns: u64) -> Result<(), String> {
        let attribute = LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_COLS as c_int;
        // SAFETY: the layout is alive; the attribute has this type.
        unsafe { self.set(self.functions.set_layout, layout, attribute, &columns) }
    }

    /// # Safety
    /// `of` is alive, and its attribute `attribute` is a `V`.
    unsafe fn set<T, V>(&self, set: Set<T>, of: T, attribute: c_int, value: &V) -> Result<(), String> {
        // SAFETY: as promised; the value is copied.
        self.functions.check(unsafe { set(of, attribute, from_ref(value).cast(), size_of::<V>()) })
    }

    /// Gives back what describes a way that is not used again. What cannot be given back goes with the process.
    fn give_back(&self, way: &Way) {
        // SAFETY: nobody else has them.
        unsafe {
            for layout in [way.weights, way.input, way.sums].into_iter().filter(|layout| !layout.is_null()) {
                (self.functions.destroy_layout)(layout);
            }
            if !way.description.is_null() {
                (self.functions.destroy_description)(way.description);
            }
        }
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.ways.values().flatten().for_each(|way| self.give_back(way));
        // SAFETY: as above; whoever has this waits for its products first.
        unsafe {
            if !self.preference.is_null() {
                (self.functions.destroy_preference)(self.preference);
            }
            if !self.handle.is_null() {
                (self.functions.destroy)(self.handle);
            }
        }
    }
}
