//! Arrays across the border, by DLPack (legacy capsules and versioned ones).
//!
//! A capsule is kept alive for the length of a call and never consumed, so its own destructor gives the memory
//! back. `uint16` counts as bfloat16: NumPy has no such type, and no operation takes 16-bit integers.
//! Layout of the structs: the DLPack specification 1.1.

use crate::door::to_python;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyTuple};
use std::ffi::c_void;
use tilewise_core::dtype::Dtype;
use tilewise_core::error::Error;
use tilewise_core::view::{Array, ArrayMut};

#[repr(C)]
struct DlDevice {
    kind: i32,
    id: i32,
}

#[repr(C)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    rank: i32,
    dtype: DlDataType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlManagedTensorVersioned {
    version: [u32; 2],
    context: *mut c_void,
    deleter: *mut c_void,
    flags: u64,
    tensor: DlTensor,
}

const READ_ONLY: u64 = 1;
const CPU: i32 = 1;
const CPU_PINNED: i32 = 3;

/// An exported array, held for the length of a call.
pub struct Held<'py> {
    name: &'static str,
    capsule: Bound<'py, PyAny>,
    tensor: *const DlTensor,
    read_only: bool,
}

/// Asks `object` for its memory.
pub fn hold<'py>(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Held<'py>> {
    let py = object.py();
    if let Some(capsule) = torch_capsule(object) {
        return open(name, capsule);
    }
    let export = object.getattr(intern!(py, "__dlpack__")).map_err(|_| {
        let kind = object.get_type().name().map_or_else(|_| "an object".into(), |n| n.to_string());
        PyTypeError::new_err(format!(
            "{name}: expected an array (NumPy, torch, or anything with __dlpack__), got {kind}"
        ))
    })?;
    let keywords = PyDict::new(py);
    keywords.set_item(intern!(py, "max_version"), (1, 0))?;
    let capsule = match export.call(PyTuple::empty(py), Some(&keywords)) {
        // Producers older than DLPack 1.0 do not know the keyword.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => export.call0(),
        other => other,
    };
    let capsule = capsule.map_err(|error| {
        // What the standard says a producer raises for memory it cannot export: sparse, lazy, of an odd type.
        if !error.is_instance_of::<PyBufferError>(py) {
            return error;
        }
        let refused = Error::value(name, "an array whose memory can be exported (DLPack)", error.value(py));
        to_python(py, &refused.hint("pass a dense array"))
    })?;
    open(name, capsule)
}

/// The capsule of a torch tensor by `torch.utils.dlpack.to_dlpack`: 0.2 us, where the method `__dlpack__` takes 1.8, and
/// a layer's call holds ten arrays. `None` for anything else, and for whatever that function refuses: the method then
/// says why.
fn torch_capsule<'py>(object: &Bound<'py, PyAny>) -> Option<Bound<'py, PyAny>> {
    static TORCH: PyOnceLock<(Py<PyAny>, Py<PyAny>)> = PyOnceLock::new();
    let py = object.py();
    if TORCH.get(py).is_none() {
        // Not for every NumPy array of a process without torch.
        if object.get_type().name().ok()? != "Tensor" {
            return None;
        }
        let modules = py.import(intern!(py, "sys")).and_then(|sys| sys.getattr(intern!(py, "modules"))).ok()?;
        let loaded = |module: &Bound<'py, PyString>| modules.cast::<PyDict>().ok()?.get_item(module).ok().flatten();
        let function = loaded(intern!(py, "torch.utils.dlpack"))?.getattr(intern!(py, "to_dlpack")).ok()?;
        let class = loaded(intern!(py, "torch"))?.getattr(intern!(py, "Tensor")).ok()?;
        _ = TORCH.set(py, (class.unbind(), function.unbind()));
    }
    let (class, function) = TORCH.get(py)?;
    // Exactly a tensor: a subclass may export itself in another way.
    if !object.get_type().is(class) || object.getattr(intern!(py, "requires_grad")).ok()?.is_truthy().ok()? {
        return None;
    }
    function.bind(py).call1((object,)).ok()
}

/// Reads a capsule.
fn open<'py>(name: &'static str, capsule: Bound<'py, PyAny>) -> PyResult<Held<'py>> {
    // SAFETY: the two names are the specification's; a capsule that answers to one holds that struct, and the
    // struct lives as long as the capsule, which `Held` keeps.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule.as_ptr(), c"dltensor_versioned".as_ptr()) == 1 {
            let managed = ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dltensor_versioned".as_ptr())
                .cast::<DlManagedTensorVersioned>();
            let read_only = (*managed).flags & READ_ONLY != 0;
            return Ok(Held { name, tensor: &raw const (*managed).tensor, read_only, capsule });
        }
        if ffi::PyCapsule_IsValid(capsule.as_ptr(), c"dltensor".as_ptr()) == 1 {
            let tensor = ffi::PyCapsule_GetPointer(capsule.as_ptr(), c"dltensor".as_ptr()).cast::<DlTensor>();
            return Ok(Held { name, tensor, read_only: false, capsule });
        }
    }
    Err(PyTypeError::new_err(format!("{name}: __dlpack__ did not return a DLPack capsule")))
}

/// [`hold`] for an optional argument.
pub fn hold_optional<'py>(name: &'static str, object: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Held<'py>>> {
    object.map(|object| hold(name, object)).transpose()
}

impl Held<'_> {
    /// The memory as a read-only view.
    pub fn array(&self) -> PyResult<Array<'_>> {
        let (data, dtype, shape, strides) = self.parts()?;
        // SAFETY: the producer guarantees that shape and strides stay inside its allocation, which the capsule
        // keeps alive. That nobody writes meanwhile is the caller's part, as for every array library.
        unsafe { Array::from_raw_parts(data, dtype, shape, strides) }.map_err(|e| to_python(self.capsule.py(), &e))
    }

    /// The memory as a writable view.
    pub fn array_mut(&mut self) -> PyResult<ArrayMut<'_>> {
        let py = self.capsule.py();
        if self.read_only {
            return Err(to_python(py, &Error::value(self.name, "a writable array", "a read-only one")));
        }
        let (data, dtype, shape, strides) = self.parts()?;
        if shape.iter().zip(&strides).any(|(&extent, &stride)| extent > 1 && stride == 0) {
            return Err(to_python(
                py,
                &Error::value(self.name, "an output without overlapping rows", "an expanded array"),
            ));
        }
        // SAFETY: as in `array`; outputs are allocated by our own front ends, distinct from every input.
        unsafe { ArrayMut::from_raw_parts(data, dtype, shape, strides) }.map_err(|e| to_python(py, &e))
    }

    fn parts(&self) -> PyResult<(*mut u8, Dtype, Vec<usize>, Vec<isize>)> {
        let py = self.capsule.py();
        // SAFETY: `tensor` points into the struct that the capsule keeps alive.
        let tensor = unsafe { &*self.tensor };
        if tensor.device.kind != CPU && tensor.device.kind != CPU_PINNED {
            let got = format!("DLPack device type {} (id {})", tensor.device.kind, tensor.device.id);
            return Err(to_python(py, &Error::Device { name: self.name.into(), allowed: "the CPU".into(), got }));
        }
        let dtype = match (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) {
            (2, 32, 1) => Dtype::F32,
            (2, 64, 1) => Dtype::F64,
            (2, 16, 1) => Dtype::F16,
            (4, 16, 1) | (1, 16, 1) => Dtype::Bf16,
            (0, 8, 1) => Dtype::I8,
            (0, 32, 1) => Dtype::I32,
            (0, 64, 1) => Dtype::I64,
            (6, 8, 1) => Dtype::Bool,
            (code, bits, lanes) => {
                let kind = match code {
                    0 => "int",
                    1 => "uint",
                    2 => "float",
                    5 => "complex",
                    7..=14 => "an 8-bit floating format of ",
                    _ => "an unknown type of ",
                };
                let got = if lanes == 1 { format!("{kind}{bits}") } else { format!("{kind}{bits}x{lanes}") };
                let allowed = "float32, float64, float16, bfloat16, int8, int32, int64 or bool";
                return Err(to_python(py, &Error::dtype(self.name, allowed, got)));
            }
        };
        let rank = tensor.rank as usize;
        let read = |pointer: *const i64| -> Vec<i64> {
            // SAFETY: the specification gives these arrays `rank` entries.
            if rank == 0 { Vec::new() } else { unsafe { std::slice::from_raw_parts(pointer, rank) }.to_vec() }
        };
        let shape: Vec<usize> = read(tensor.shape).into_iter().map(|extent| extent as usize).collect();
        // NumPy may give empty arrays strides of zero, which say nothing.
        let strides = if tensor.strides.is_null() || shape.contains(&0) {
            let mut strides = vec![1isize; rank];
            for axis in (1..rank).rev() {
                strides[axis - 1] = strides[axis] * shape[axis].max(1) as isize;
            }
            strides
        } else {
            read(tensor.strides).into_iter().map(|stride| stride as isize).collect()
        };
        // `wrapping_add`: the pointer of an empty tensor may be null.
        let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        Ok((data, dtype, shape, strides))
    }
}
