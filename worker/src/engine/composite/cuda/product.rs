//! Matrix products by cuBLAS, with operands in single precision or rounded to bf16, and sums in single precision.

use std::ffi::c_int;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use cohort_common::spec::Precision;

/// `x W` of `[rows, inputs]` with W `[inputs, outputs]`, or `x Wᵀ` with W `[outputs, inputs]`.
pub fn product(x: &Tensor, w: &Tensor, transposed: bool, precision: Precision) -> Result<Tensor> {
    let product = Product {
        left: false,
        right: transposed,
        precision,
    };
    x.contiguous()?.apply_op2(&w.contiguous()?, product)
}

/// `op(A) op(B)`, each transposed or not.
#[derive(Clone, Copy)]
struct Product {
    left: bool,
    right: bool,
    precision: Precision,
}

impl Product {
    fn run(self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &self)
    }

    /// Rows, columns and depth of the product.
    fn size(self, a: &Layout, b: &Layout) -> Result<(usize, usize, usize)> {
        let turned = |layout: &Layout, turn| -> Result<(usize, usize)> {
            let (rows, cols) = layout.shape().dims2()?;
            Ok(if turn { (cols, rows) } else { (rows, cols) })
        };
        let ((rows, depth), (inner, cols)) = (turned(a, self.left)?, turned(b, self.right)?);
        if depth != inner {
            bail!("a product of {rows} x {depth} and {inner} x {cols}");
        }
        Ok((rows, cols, depth))
    }
}

/// The pointer to an operand, its type, and what keeps it in order with other work on it.
fn operand<'a>(
    storage: &'a CudaStorage,
    offset: usize,
    stream: &'a CudaStream,
) -> Result<(u64, sys::cudaDataType, SyncOnDrop<'a>)> {
    match &storage.slice {
        CudaStorageSlice::F32(slice) => {
            let (at, guard) = slice.device_ptr(stream);
            Ok((at + 4 * offset as u64, sys::cudaDataType::CUDA_R_32F, guard))
        }
        CudaStorageSlice::BF16(slice) => {
            let (at, guard) = slice.device_ptr(stream);
            Ok((
                at + 2 * offset as u64,
                sys::cudaDataType::CUDA_R_16BF,
                guard,
            ))
        }
        _ => bail!("a product of neither f32 nor bf16"),
    }
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("this product is an operation of CUDA alone")
    }

    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        of_a: &Layout,
        b: &CudaStorage,
        of_b: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (m, n, k) = self.size(of_a, of_b)?;
        let device = a.device().clone();
        let stream = device.cuda_stream();
        let rounded = match self.precision {
            Precision::F32 => None,
            Precision::Bf16 => Some((
                a.to_dtype(of_a, DType::BF16)?,
                b.to_dtype(of_b, DType::BF16)?,
            )),
        };
        let ((a, at_a), (b, at_b)) = match &rounded {
            None => ((a, of_a.start_offset()), (b, of_b.start_offset())),
            Some((a, b)) => ((a, 0), (b, 0)),
        };
        // SAFETY: the product writes every element.
        let mut out = unsafe { device.alloc::<f32>(m * n)? };
        {
            let (a, type_a, _a) = operand(a, at_a, &stream)?;
            let (b, type_b, _b) = operand(b, at_b, &stream)?;
            let (c, _c) = out.device_ptr_mut(&stream);
            let turn = |yes| match yes {
                true => sys::cublasOperation_t::CUBLAS_OP_T,
                false => sys::cublasOperation_t::CUBLAS_OP_N,
            };
            let int = |n: usize| c_int::try_from(n).expect("a dimension is below 2^31");
            let (one, zero) = (1f32, 0f32);
            // cuBLAS takes columns for rows, so it is asked for Bᵀ Aᵀ, which is the transposed product.
            // SAFETY: the operands have the sizes that `size` has found, and live until the guards are dropped; work on
            // this stream is done in order.
            unsafe {
                gemm_ex(
                    *device.cublas_handle().handle(),
                    turn(self.right),
                    turn(self.left),
                    int(n),
                    int(m),
                    int(k),
                    (&raw const one).cast(),
                    b as *const _,
                    type_b,
                    int(if self.right { k } else { n }),
                    a as *const _,
                    type_a,
                    int(if self.left { m } else { k }),
                    (&raw const zero).cast(),
                    c as *mut _,
                    sys::cudaDataType::CUDA_R_32F,
                    int(n),
                    sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            }
            .w()?;
        }
        Ok((
            CudaStorage::wrap_cuda_slice(out, device),
            Shape::from((m, n)),
        ))
    }

    /// Of `C = A op(B)`: `dA = G op(B)ᵀ`; `dB = Aᵀ G`, or `Gᵀ A` where B is transposed.
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let product = |left, right| Product {
            left,
            right,
            ..*self
        };
        // A frozen weight wants none.
        let wanted = [a.track_op(), b.track_op()];
        let (a, b, g) = (a.detach(), b.detach(), g.detach());
        let of_a = || product(false, !self.right).run(&g, &b);
        let of_b = || match self.right {
            false => product(true, false).run(&a, &g),
            true => product(true, false).run(&g, &a),
        };
        Ok((
            wanted[0].then(of_a).transpose()?,
            wanted[1].then(of_b).transpose()?,
        ))
    }
}
