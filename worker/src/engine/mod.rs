//! The engine: a model, its flat buffers and everything that happens to them. It knows no network, no clock and no
//! file; one thread owns it.
//!
//! On the CPU the `fused` path computes with the kernels of `ops`; elsewhere the `composite` path computes with
//! candle's own operations. Parameters, moments and gradients live in flat host buffers in the layout's order, so the
//! optimizer, the norm, the hash, the wire and the checkpoint each walk memory once.
//!
//! **Invariant:** on the CPU no result depends on the number of threads.

mod composite;
mod device;
mod error;
mod fingerprint;
mod fused;
mod generate;
mod gradient;
mod init;
pub mod ops;
mod optim;
mod parameters;
mod products;
mod round;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;
use std::sync::Arc;

use candle_core::Device;
use cohort_common::layout::{Layout, TensorSpec};
use cohort_common::spec::{Diloco, LoraConfig, ModelConfig, Precision, TrainConfig};
use cohort_common::tree::Node;

use self::composite::Composite;
pub use self::device::DeviceChoice;
pub use self::error::{EngineError, Result};
use self::fused::Fused;
pub use self::generate::{Sampling, generate};
pub use self::gradient::Gradient;
use self::optim::AdamW;
pub use self::optim::Moments;
pub use self::products::products;
pub use self::round::RoundStart;

/// Samples of one length, row by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids, `[samples, length]`.
    pub inputs: Vec<u32>,
    /// The token after each input, `[samples, length]`.
    pub targets: Vec<u32>,
    /// Weight of each target, `[samples, length]`; 0 is not scored.
    pub weights: Vec<f32>,
    /// For each input the place within its row where its segment begins, `[samples, length]`. Segments do not attend to
    /// each other and count their positions from 0. Empty where every row is one segment.
    pub starts: Vec<u32>,
    /// Number of samples.
    pub samples: usize,
    /// Tokens in each sample, at most the model's context.
    pub length: usize,
}

/// Where in a run a micro-batch stands: the counter of its random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// The lane.
    pub lane: u32,
    /// The micro-batch within the lane.
    pub micro_batch: u32,
}

/// What scoring a batch gives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// Σ weight · negative log-likelihood, in nats.
    pub loss: f64,
    /// Σ weight.
    pub weight: f64,
}

/// What scoring a batch gives, and what a classifier took its samples for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// The sums.
    pub sums: Sums,
    /// Of a classifier: samples by label (rows) and by the label they were given (columns), row by row; else empty.
    pub confusion: Vec<u64>,
}

/// Hears, while backward goes on, how many elements of a gradient are complete, from the first on.
pub type Progress<'a> = &'a mut (dyn FnMut(&Gradient, usize) + Send);

/// One optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// The step's number; the first is 1.
    pub step: u64,
    /// The number of this update: the step's, less the steps before it that were skipped.
    pub count: u64,
    /// Factor of the root gradient: the clip factor divided by Σ weight.
    pub scale: f64,
    /// The learning rate.
    pub learning_rate: f64,
}

/// A copy of everything that training changes, in the layout's order. Without an optimizer the moments are empty.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Parameters that are trained.
    pub params: Vec<f32>,
    /// AdamW's first moment; of a run in rounds the momentum of the outer step.
    pub exp_avg: Vec<f32>,
    /// AdamW's second moment; of a run in rounds zeros.
    pub exp_avg_sq: Vec<f32>,
}

/// The optimizer and what it remembers.
struct Optimizer {
    adamw: AdamW,
    moments: Moments,
    /// A run in rounds: `adamw` takes inner steps.
    diloco: Option<Diloco>,
    /// Moments of inner steps, to be used again.
    spare: Option<Moments>,
}

/// A model that can be trained, scored and sampled from.
pub struct Engine {
    model: ModelConfig,
    layout: Layout,
    /// The only threads that compute.
    pool: rayon::ThreadPool,
    params: Arc<Vec<f32>>,
    optimizer: Option<Optimizer>,
    /// Elements of a gradient: of what is trained, without layers that are frozen for the whole run.
    gradient_len: usize,
    /// The CPU path; also generates where `composite` trains.
    fused: Arc<Fused>,
    /// The path of other devices.
    composite: Option<Composite>,
    fingerprint: String,
}

/// The name of a device and the numerics fingerprint of engines on it, without a model.
pub fn describe_device(choice: DeviceChoice) -> Result<(String, String)> {
    let device = choice.open()?;
    let name = match device {
        Device::Cpu => "cpu".to_owned(),
        _ => choice.to_string().replace("auto", "cuda:0"),
    };
    Ok((name, fingerprint::fingerprint(&device)?))
}

/// Compute threads of an engine that is asked for `threads`; 0 means one per core.
pub fn thread_count(threads: usize) -> usize {
    match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

impl Engine {
    /// Runs work on the engine's threads.
    pub fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.pool.install(work)
    }

    /// An engine with all-zero parameters. With `train` it has an optimizer with zero moments; without, it only infers.
    /// `threads` is the number of compute threads; 0 takes one per core.
    pub fn new(
        model: &ModelConfig,
        train: Option<&TrainConfig>,
        device: DeviceChoice,
        threads: usize,
    ) -> Result<Self> {
        Self::adapted(model, None, train, device, threads)
    }

    /// [`Engine::new`] with adapters, which are all that is trained. The weights behind them come with [`Engine::load`].
    pub fn adapted(
        model: &ModelConfig,
        lora: Option<&LoraConfig>,
        train: Option<&TrainConfig>,
        device: DeviceChoice,
        threads: usize,
    ) -> Result<Self> {
        let device = device.open()?;
        let composite = !matches!(device, Device::Cpu);
        Self::with_path((model, lora), train, device, threads, composite)
    }

    fn with_path(
        (model, lora): (&ModelConfig, Option<&LoraConfig>),
        train: Option<&TrainConfig>,
        device: Device,
        threads: usize,
        composite: bool,
    ) -> Result<Self> {
        let layout = Layout::adapted(model, lora);
        let precision = train.map(|train| train.precision).unwrap_or_default();
        let again = train.is_some_and(|train| train.gradient_checkpointing);
        let optimizer = train.map(|train| Optimizer {
            adamw: AdamW::new(train, model, &layout),
            moments: Moments::zeros(layout.len()),
            diloco: train.diloco,
            spare: None,
        });
        let gradient_len = optimizer
            .as_ref()
            .map_or(layout.len(), |optimizer| optimizer.adamw.gradient_len());
        let setup = (precision, again);
        let fused = Arc::new(Fused::new(model, &layout, gradient_len, lora, setup)?);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("engine-{index}"))
            .build()
            .map_err(|source| EngineError::Threads { threads, source })?;
        if precision == Precision::Bf16 && !composite && !ops::gemm::has_amx() {
            tracing::warn!(
                "this processor has no AMX: products in bf16 are slower than in f32 here, to the same bits as elsewhere"
            );
        }
        if again && composite {
            tracing::warn!(
                "gradient_checkpointing is for the CPU: this device keeps its activations"
            );
        }
        let composite = match composite {
            true => {
                let shape = (model, &layout, gradient_len);
                Some(Composite::new(shape, lora, precision, &device)?)
            }
            false => None,
        };
        Ok(Self {
            model: model.clone(),
            params: Arc::new(vec![0.0; layout.total()]),
            fingerprint: pool.install(|| fingerprint::fingerprint(&device))?,
            layout,
            pool,
            optimizer,
            gradient_len,
            fused,
            composite,
        })
    }

    /// Initial weights for `seed`, and zero moments. What is frozen stays as it is.
    pub fn init(&mut self, seed: u64) -> Result<()> {
        self.init_where(seed, &|_| true)
    }

    /// [`Engine::init`] of those trained tensors alone that `chosen` says.
    pub fn init_where(
        &mut self,
        seed: u64,
        chosen: &(dyn Fn(&TensorSpec) -> bool + Sync),
    ) -> Result<()> {
        let params = Arc::make_mut(&mut self.params);
        let (model, layout) = (&self.model, &self.layout);
        self.pool
            .install(|| init::init(params, model, layout, seed, chosen));
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.moments = Moments::zeros(self.layout.len());
        }
        self.upload()
    }

    /// Takes all parameters, those that are frozen included, and moments or zeros, in the layout's order.
    pub fn load(&mut self, params: &[f32], moments: Option<(&[f32], &[f32])>) -> Result<()> {
        if params.len() != self.layout.total() {
            return Err(EngineError::Length {
                what: "the parameters",
                got: params.len(),
                expected: self.layout.total(),
            });
        }
        if let Some((first, second)) = moments {
            self.check_length("the first moments", first.len())?;
            self.check_length("the second moments", second.len())?;
        }
        Arc::make_mut(&mut self.params).copy_from_slice(params);
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.moments = match moments {
                Some((first, second)) => Moments {
                    exp_avg: first.to_vec(),
                    exp_avg_sq: second.to_vec(),
                },
                None => Moments::zeros(self.layout.len()),
            };
        }
        self.upload()
    }

    /// Takes moments, in the layout's order.
    pub fn take_moments(&mut self, moments: Moments) -> Result<()> {
        self.check_length("the first moments", moments.exp_avg.len())?;
        self.check_length("the second moments", moments.exp_avg_sq.len())?;
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.moments = moments;
        }
        Ok(())
    }

    /// Where each parameter lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The model's shape.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// The parameters that are trained, in the layout's order.
    pub fn params(&self) -> &[f32] {
        &self.params[..self.layout.len()]
    }

    /// All parameters, those that are frozen included.
    pub fn all_params(&self) -> &[f32] {
        &self.params
    }

    /// AdamW's first and second moments, of a run in rounds the outer momentum and zeros; empty without an optimizer.
    pub fn moments(&self) -> (&[f32], &[f32]) {
        match &self.optimizer {
            Some(optimizer) => (&optimizer.moments.exp_avg, &optimizer.moments.exp_avg_sq),
            None => (&[], &[]),
        }
    }

    /// The hash of parameters and moments; `None` without an optimizer.
    pub fn state_hash(&self) -> Option<[u8; 32]> {
        let moments = &self.optimizer.as_ref()?.moments;
        let hash = || {
            let (first, second) = (&moments.exp_avg, &moments.exp_avg_sq);
            cohort_common::checkpoint::state_hash(self.params(), first, second)
        };
        Some(self.pool.install(hash))
    }

    /// A copy of parameters and moments.
    pub fn snapshot(&self) -> State {
        let (exp_avg, exp_avg_sq) = self.moments();
        State {
            params: self.params().to_vec(),
            exp_avg: exp_avg.to_vec(),
            exp_avg_sq: exp_avg_sq.to_vec(),
        }
    }

    /// Adds the gradient of `Σ w·nll` over `batch` to `grad` (an empty one starts at zero), with the dropout of `site`.
    /// After an error `grad` may hold part of the sum.
    pub fn accumulate(&mut self, batch: &Batch, site: Site, grad: &mut Gradient) -> Result<Sums> {
        self.accumulate_telling(batch, site, grad, None)
    }

    /// The same; `progress` hears how much of the gradient is complete, if this is the last micro-batch.
    pub fn accumulate_telling(
        &mut self,
        batch: &Batch,
        site: Site,
        grad: &mut Gradient,
        progress: Option<Progress<'_>>,
    ) -> Result<Sums> {
        let node = Node::leaf(site.lane);
        if grad.is_empty() {
            let sums = self.gradient_telling(node, &[(batch, site)], grad, progress)?;
            return Ok(sums[0]);
        }
        self.check_batch(batch)?;
        self.check_gradient(grad.len())?;
        let progress = self.telling(progress);
        let sums = self.pool.install(|| match &self.composite {
            Some(composite) => Ok(composite.accumulate(batch, site, grad)?),
            None => {
                let (fused, lane) = (&self.fused, [(batch, site)]);
                let sums = fused.gradient(&self.params, node, &lane, grad, false, progress)?;
                Ok::<_, EngineError>(sums[0])
            }
        })?;
        self.freeze(site.step, grad);
        Ok(sums)
    }

    /// Whether the lanes of a node, with `rows` tokens each, can share one pass: [`Self::gradient`] takes them together.
    pub fn shares(&self, rows: usize, lanes: usize) -> bool {
        let many = || match &self.composite {
            Some(composite) => composite.adds(lanes),
            None => self.fused.shares(rows, lanes),
        };
        lanes == 1 || many()
    }

    /// The gradient of `Σ w·nll`, summed along the tree over the lanes of `node`, one micro-batch of equal size for each;
    /// to the bits of lanes computed alone. Overwrites `grad`, and returns the sums of each lane.
    pub fn gradient(
        &mut self,
        node: Node,
        micro_batches: &[(&Batch, Site)],
        grad: &mut Gradient,
    ) -> Result<Vec<Sums>> {
        self.gradient_telling(node, micro_batches, grad, None)
    }

    /// The same; `progress` hears how much of the gradient is complete while the rest is computed.
    pub fn gradient_telling(
        &mut self,
        node: Node,
        micro_batches: &[(&Batch, Site)],
        grad: &mut Gradient,
        progress: Option<Progress<'_>>,
    ) -> Result<Vec<Sums>> {
        for (batch, _) in micro_batches {
            self.check_batch(batch)?;
            let (first, _) = micro_batches[0];
            if (batch.samples, batch.length) != (first.samples, first.length) {
                return Err(EngineError::Batch(format!(
                    "lanes that share a pass have micro-batches of {} x {} and of {} x {} tokens",
                    first.samples, first.length, batch.samples, batch.length
                )));
            }
        }
        if micro_batches.len() != node.size as usize {
            let batches = micro_batches.len();
            return Err(EngineError::Batch(format!(
                "{batches} micro-batches for {node}"
            )));
        }
        grad.fit(self.gradient_len);
        let progress = self.telling(progress);
        let sums = self.pool.install(|| match &self.composite {
            Some(composite) => {
                Ok::<_, EngineError>(composite.gradient(node, micro_batches, grad)?)
            }
            None => {
                let fused = &self.fused;
                fused.gradient(&self.params, node, micro_batches, grad, true, progress)
            }
        })?;
        self.freeze(micro_batches[0].1.step, grad);
        Ok(sums)
    }

    /// Who hears of progress: nobody where what is complete may still change.
    fn telling<'a>(&self, progress: Option<Progress<'a>>) -> Option<Progress<'a>> {
        let rates = self.optimizer.as_ref().and_then(|o| o.adamw.rates());
        progress.filter(|_| rates.is_none())
    }

    /// Takes the gradient of frozen layers away, so that it counts nowhere.
    fn freeze(&self, step: u64, grad: &mut [f32]) {
        let rates = self.optimizer.as_ref().and_then(|o| o.adamw.rates());
        let Some(rates) = rates else { return };
        // Layers that are frozen for the whole run lie behind the gradient.
        let len = grad.len();
        let has = |tensor: &&TensorSpec| tensor.range().end <= len;
        for tensor in self.layout.tensors().iter().take_while(has) {
            if rates.rate(rates.depth(&tensor.name), step) == 0.0 {
                grad[tensor.range()].fill(0.0);
            }
        }
    }

    /// One step by the gradient `root`: of AdamW, or the outer one of a round.
    pub fn update(&mut self, root: &[f32], update: Update) -> Result<()> {
        let diloco = self.optimizer.as_ref().and_then(|o| o.diloco);
        self.step(root, update, diloco)
    }

    /// One inner step of AdamW by a lane's own gradient.
    pub fn inner_update(&mut self, gradient: &[f32], update: Update) -> Result<()> {
        self.step(gradient, update, None)
    }

    fn step(&mut self, root: &[f32], update: Update, outer: Option<Diloco>) -> Result<()> {
        self.check_gradient(root.len())?;
        if update.step == 0 || update.count == 0 {
            return Err(EngineError::Step(0));
        }
        let Some(Optimizer { adamw, moments, .. }) = &mut self.optimizer else {
            return Err(EngineError::InferenceOnly);
        };
        let params = &mut Arc::make_mut(&mut self.params)[..root.len()];
        self.pool.install(|| match outer {
            Some(diloco) => {
                round::outer_update(params, &mut moments.exp_avg, root, update.scale, diloco)
            }
            None => adamw.update(params, moments, root, 0, update),
        });
        self.upload()
    }

    /// Forgets the moments: somebody else keeps them, slice by slice.
    pub fn give_moments_away(&mut self) {
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.moments = Moments::zeros(0);
        }
    }

    /// One step of AdamW of the parameters from the element `first` on, as many as `root` has, whose moments are given. Nothing
    /// is computed with them before [`Self::take_params`].
    pub fn update_slice(
        &mut self,
        first: usize,
        moments: &mut Moments,
        root: &[f32],
        update: Update,
    ) -> Result<()> {
        if update.step == 0 || update.count == 0 {
            return Err(EngineError::Step(0));
        }
        let Some(Optimizer { adamw, .. }) = &self.optimizer else {
            return Err(EngineError::InferenceOnly);
        };
        let params = &mut Arc::make_mut(&mut self.params)[first..first + root.len()];
        self.pool
            .install(|| adamw.update(params, moments, root, first, update));
        Ok(())
    }

    /// Takes new parameters of these elements from a buffer of all.
    pub fn take_params(&mut self, slices: &[Range<usize>], from: &[f32]) -> Result<()> {
        let params = Arc::make_mut(&mut self.params);
        for slice in slices {
            params[slice.clone()].copy_from_slice(&from[slice.clone()]);
        }
        self.upload()
    }

    /// Scores a batch: no dropout, no gradient.
    pub fn score(&mut self, batch: &Batch) -> Result<Scores> {
        self.check_batch(batch)?;
        self.pool.install(|| match &self.composite {
            Some(composite) => Ok(composite.score(batch)?),
            None => self.fused.score(&self.params, batch),
        })
    }

    /// Logits of one sequence, `[tokens, outputs]`.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.check_tokens(tokens)?;
        if tokens.is_empty() || tokens.len() > self.model.context {
            let text = format!(
                "{} tokens for a context of {}",
                tokens.len(),
                self.model.context
            );
            return Err(EngineError::Batch(text));
        }
        self.pool.install(|| match &self.composite {
            Some(composite) => Ok(composite.logits(tokens)?),
            None => self.fused.logits(&self.params, tokens),
        })
    }

    /// What decides the bits of a result: version, device, instruction set, and a digest of a few products. Engines of
    /// equal fingerprints give equal bits.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    fn upload(&self) -> Result<()> {
        match &self.composite {
            Some(composite) => Ok(composite.upload(&self.params)?),
            None => Ok(()),
        }
    }

    fn check_length(&self, what: &'static str, got: usize) -> Result<()> {
        expect_length(what, got, self.layout.len())
    }

    fn check_gradient(&self, got: usize) -> Result<()> {
        expect_length("the gradients", got, self.gradient_len)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab = self.model.vocab_size;
        match tokens.iter().find(|&&token| token as usize >= vocab) {
            Some(token) => Err(EngineError::Batch(format!(
                "token {token} is outside the vocabulary of {vocab}"
            ))),
            None => Ok(()),
        }
    }

    fn check_batch(&self, batch: &Batch) -> Result<()> {
        let fail = |text: String| Err(EngineError::Batch(text));
        let Batch {
            inputs,
            targets,
            weights,
            starts,
            samples,
            length,
        } = batch;
        let (elements, context) = (samples * length, self.model.context);
        if elements == 0 || *length > context {
            return fail(format!(
                "{samples} samples of {length} tokens for a context of {context}"
            ));
        }
        if [inputs.len(), targets.len(), weights.len()] != [elements; 3] {
            return fail(format!(
                "{samples} samples of {length} tokens need {elements} elements, got {} inputs, {} targets and {} weights",
                inputs.len(),
                targets.len(),
                weights.len()
            ));
        }
        let inside = |(r, &start): (usize, &u32)| start as usize <= r % length;
        if !starts.is_empty()
            && (starts.len() != elements || !starts.iter().enumerate().all(inside))
        {
            return fail(format!(
                "the segments of {elements} tokens begin at {} places, or after themselves",
                starts.len()
            ));
        }
        self.check_tokens(inputs)?;
        let scored = targets
            .iter()
            .zip(weights)
            .filter(|(_, weight)| **weight != 0.0);
        let outputs = self.model.outputs();
        match scored
            .map(|(&target, _)| target)
            .find(|&target| target as usize >= outputs)
        {
            Some(target) => fail(format!(
                "target {target} is not below the {outputs} outputs"
            )),
            None => Ok(()),
        }
    }
}

fn expect_length(what: &'static str, got: usize, expected: usize) -> Result<()> {
    match got == expected {
        true => Ok(()),
        false => Err(EngineError::Length {
            what,
            got,
            expected,
        }),
    }
}
