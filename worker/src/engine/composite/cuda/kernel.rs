//! How kernels of ours are launched on candle's tensors, and how what they compute becomes part of its graph.

use std::sync::Mutex;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaView, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, Layout, Result, Shape,
    Storage, Tensor, bail,
};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Threads of a block, `THREADS` in `kernels.cu`.
const THREADS: u32 = 256;

/// Columns that one block adds up, `WARP` in `kernels.cu`.
const COLUMNS: u32 = 32;

/// What every kernel is told, `Params` in `kernels.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Params {
    pub rows: i32,
    pub cols: i32,
    pub a: i32,
    pub b: i32,
    pub x: f32,
}

// SAFETY: plain numbers, laid out as in C.
unsafe impl DeviceRepr for Params {}

/// What one block, or one thread of a block, works on.
#[derive(Clone, Copy)]
pub enum Blocks {
    /// A block for each row.
    Rows,
    /// A block for `COLUMNS` columns.
    Columns,
    /// A thread for each element.
    Elements,
    /// A thread for every two elements.
    Pairs,
}

impl Blocks {
    fn count(self, params: Params) -> u32 {
        let (rows, cols) = (params.rows as usize, params.cols as usize);
        let threads = |all: usize| all.div_ceil(THREADS as usize) as u32;
        match self {
            Self::Rows => params.rows as u32,
            Self::Columns => (params.cols as u32).div_ceil(COLUMNS),
            Self::Elements => threads(rows * cols),
            Self::Pairs => threads(rows * cols / 2),
        }
    }
}

/// A kernel of `kernels.cu`.
pub struct Kernel {
    name: &'static str,
    out: Shape,
    blocks: Blocks,
    params: Params,
}

impl Kernel {
    /// A kernel that gives a tensor of the shape of another.
    pub fn new(name: &'static str, like: &Tensor, blocks: Blocks, params: Params) -> Self {
        Self::of_shape(name, like.shape(), blocks, params)
    }

    /// A kernel that gives a tensor of that shape.
    pub fn of_shape(
        name: &'static str,
        out: impl Into<Shape>,
        blocks: Blocks,
        params: Params,
    ) -> Self {
        Self {
            name,
            out: out.into(),
            blocks,
            params,
        }
    }

    /// Launches it. Nothing is recorded for a backward.
    pub fn run(self, inputs: &[&Tensor]) -> Result<Tensor> {
        let contiguous = |t: &&Tensor| t.contiguous();
        let inputs: Vec<Tensor> = inputs.iter().map(contiguous).collect::<Result<_>>()?;
        let launch = Launch {
            kernel: &self,
            rest: &inputs[1..],
        };
        inputs[0].apply_op1_no_bwd(&launch)
    }
}

/// A kernel with all its inputs but the first, which candle brings.
struct Launch<'a> {
    kernel: &'a Kernel,
    rest: &'a [Tensor],
}

enum Input<'a> {
    Floats(CudaView<'a, f32>),
    Integers(CudaView<'a, u32>),
}

impl Input<'_> {
    fn of<'a>(name: &str, storage: &'a CudaStorage, layout: &Layout) -> Result<Input<'a>> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("{name}: an input is not contiguous")
        };
        match &storage.slice {
            CudaStorageSlice::F32(slice) => Ok(Input::Floats(slice.slice(from..to))),
            CudaStorageSlice::U32(slice) => Ok(Input::Integers(slice.slice(from..to))),
            _ => bail!("{name}: an input is neither f32 nor u32"),
        }
    }
}

impl CustomOp1 for Launch<'_> {
    fn name(&self) -> &'static str {
        self.kernel.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{} is an operation of CUDA alone", self.kernel.name)
    }

    fn cuda_fwd(&self, first: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Kernel {
            name,
            out: shape,
            blocks,
            params,
        } = self.kernel;
        let device = first.device().clone();
        let rest = self.rest.iter().map(Tensor::storage_and_layout);
        let rest: Vec<_> = rest.collect();
        let mut inputs = vec![Input::of(name, first, layout)?];
        for (storage, layout) in &rest {
            match &**storage {
                Storage::Cuda(storage) => inputs.push(Input::of(name, storage, layout)?),
                _ => bail!("{name}: an input is not on the GPU"),
            }
        }
        let function = device.get_or_load_custom_func(name, "cohort", KERNELS)?;
        // SAFETY: each kernel writes every element of its output.
        let mut out = unsafe { device.alloc::<f32>(shape.elem_count())? };
        let mut builder = function.builder();
        for input in &inputs {
            match input {
                Input::Floats(view) => builder.arg(view),
                Input::Integers(view) => builder.arg(view),
            };
        }
        builder.arg(&mut out);
        builder.arg(params);
        let config = LaunchConfig {
            grid_dim: (blocks.count(*params), 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are those of the kernel in `kernels.cu`, in its order, and as long as `params` says.
        unsafe { builder.launch(config) }.w()?;
        Ok((CudaStorage::wrap_cuda_slice(out, device), shape.clone()))
    }
}

type Backward = dyn Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync;

/// Makes `output`, which nobody else has, the result of an operation on one to three arguments. `backward` gets the
/// arguments and the result's gradient, and gives the arguments' gradients.
pub fn node(
    name: &'static str,
    args: &[&Tensor],
    output: Tensor,
    backward: impl Fn(&[&Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let take = Take(Mutex::new(None));
    output.inplace_op1(&take)?;
    let node = Node {
        name,
        output: take.0,
        shape: output.shape().clone(),
        backward: Box::new(backward),
    };
    match args {
        [x] => x.apply_op1(node),
        [x, y] => x.apply_op2(y, node),
        [x, y, z] => x.apply_op3(y, z, node),
        _ => bail!("{name}: {} arguments", args.len()),
    }
}

/// Takes a tensor's memory away and leaves it with none.
struct Take(Mutex<Option<CudaStorage>>);

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("what is taken lies on the GPU")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        if !layout.is_contiguous() || layout.start_offset() != 0 {
            bail!("a part of a tensor is taken")
        }
        let device = storage.device.clone();
        let nothing = CudaStorageSlice::U8(device.alloc_zeros::<u8>(1)?);
        let slice = std::mem::replace(&mut storage.slice, nothing);
        *self.0.lock().expect("no panic while taking") = Some(CudaStorage { slice, device });
        Ok(())
    }
}

struct Node {
    name: &'static str,
    output: Mutex<Option<CudaStorage>>,
    shape: Shape,
    backward: Box<Backward>,
}

impl Node {
    fn here<T>(&self) -> Result<T> {
        bail!("{} is an operation of CUDA alone", self.name)
    }

    fn take(&self) -> Result<(CudaStorage, Shape)> {
        match self.output.lock().expect("no panic while taking").take() {
            Some(storage) => Ok((storage, self.shape.clone())),
            None => bail!("{} is asked for its output twice", self.name),
        }
    }

    fn gradients<const N: usize>(
        &self,
        args: [&Tensor; N],
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        // To their backward, arguments are constants: nobody differentiates twice.
        let args = args.map(Tensor::detach);
        let found = (self.backward)(&args.each_ref(), &gradient.detach())?;
        let found: Vec<_> = found.into_iter().map(Some).collect();
        let count = found.len();
        found.try_into().map_err(|_| {
            let text = format!("{}: {count} gradients for {N} arguments", self.name);
            candle_core::Error::Msg(text)
        })
    }
}

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.here()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [x] = self.gradients([x], gradient)?;
        Ok(x)
    }
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.here()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [x, y] = self.gradients([x, y], gradient)?;
        Ok((x, y))
    }
}

impl CustomOp3 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.here()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [x, y, z] = self.gradients([x, y, z], gradient)?;
        Ok((x, y, z))
    }
}
