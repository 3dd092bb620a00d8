//! The operations of training, each computed by the GPU's kernels where the tensors lie on one, and by its formula
//! elsewhere.

use candle_core::{Result, Tensor};
use cohort_common::spec::Precision;

use super::super::ops::norm;
use super::{Places, Table, plain};

macro_rules! operation {
    ($name:ident($x:ident: &Tensor $(, $arg:ident: $type:ty)*)) => {
        #[doc = concat!("[`plain::", stringify!($name), "`].")]
        pub fn $name($x: &Tensor $(, $arg: $type)*) -> Result<Tensor> {
            #[cfg(feature = "cuda")]
            if $x.device().is_cuda() {
                return super::cuda::$name($x $(, $arg)*);
            }
            plain::$name($x $(, $arg)*)
        }
    };
}

operation!(product(x: &Tensor, w: &Tensor, transposed: bool, precision: Precision));
operation!(embedding(table: &Tensor, ids: &Tensor, rows: &[u32]));
operation!(bias(x: &Tensor, bias: &Tensor));
operation!(norm(x: &Tensor, weight: &Tensor, kind: norm::Kind, eps: f32));
operation!(attention(q: &Tensor, k: &Tensor, v: &Tensor, places: &Places, scale: f32, factors: Option<&Tensor>));
operation!(rotate(x: &Tensor, places: &Places, table: &Table));
operation!(swiglu(gate: &Tensor, up: &Tensor));
operation!(gelu(x: &Tensor));
operation!(losses(logits: &Tensor, targets: &Tensor, weights: &Tensor));
