//! Traces of steps, for OpenTelemetry: spans go to a collector by OTLP over gRPC. Off unless a collector is named; then a
//! step out of every so many is traced, so that it stays cheap.
//!
//! A step's trace id and the id of its root span are derived from the run's name and the step's number. So coordinator and
//! workers agree on them, and no message carries anything. Whoever makes a span gives its times; no clock is read here.
//!
//! Nothing that a run does waits for a collector: spans wait in a queue with a bound, what does not fit is dropped, and
//! failures are logged once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanExporter, SpanProcessor,
};
use thiserror::Error;
use tonic::transport::Endpoint;
use tracing::warn;

use crate::ids::{RunId, Step};

/// Spans that may wait for the collector; more are dropped.
const QUEUE: usize = 4096;

/// Spans of one message.
const BATCH: usize = 512;

/// Time between two messages.
const PAUSE: Duration = Duration::from_secs(1);

/// How long the collector may take for a message.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How long the last spans may take when the process ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// Why traces cannot be sent.
#[derive(Debug, Error)]
pub enum TracesError {
    /// The address.
    #[error(
        "`{url}` is no address of a collector: {reason}; expected something like `http://127.0.0.1:4317`"
    )]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// An attribute of a span: its name and its value.
pub type Attribute = KeyValue;

/// The way to a collector, or none. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Way>>);

#[derive(Debug)]
struct Way {
    every: u64,
    service: &'static str,
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
    /// Makes the ids of spans that are no roots differ.
    spans: AtomicU64,
    process: u64,
}

impl Traces {
    /// Traces a step out of every `every`, and sends what `service` does in it to a collector. Needs tokio around it, but
    /// does not connect: a collector that is not there yet may come later. `process` tells processes of a service apart.
    pub fn to(
        url: &str,
        every: u64,
        service: &'static str,
        process: u64,
    ) -> Result<Self, TracesError> {
        let wrong = |reason: String| TracesError::Url {
            url: url.into(),
            reason,
        };
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|e| wrong(e.to_string()))?;
        if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().host().is_none() {
            return Err(wrong("it does not begin with `http://`".into()));
        }
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_timeout(TIMEOUT)
            .with_channel(endpoint.timeout(TIMEOUT).connect_lazy())
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(PAUSE)
            .build();
        let exporter = Patient {
            exporter,
            url: url.into(),
            failed: AtomicBool::new(false),
        };
        let mut processor = BatchSpanProcessor::new(exporter, config);
        let resource = Resource::builder_empty()
            .with_service_name(service)
            .with_attribute(KeyValue::new("process.pid", process as i64))
            .build();
        processor.set_resource(&resource);
        Ok(Self(Some(Arc::new(Way {
            every: every.max(1),
            service,
            processor,
            scope: InstrumentationScope::builder("cohort").build(),
            spans: AtomicU64::new(0),
            process,
        }))))
    }

    /// The trace of a step; `None` if this step is not traced.
    pub fn step(&self, run: &RunId, step: Step) -> Option<StepTrace> {
        let way = self
            .0
            .as_ref()
            .filter(|way| step.is_multiple_of(way.every))?;
        let (trace, root) = ids(run, step);
        Some(StepTrace {
            way: way.clone(),
            trace,
            root,
            attributes: vec![
                KeyValue::new("cohort.run", run.as_str().to_owned()),
                KeyValue::new("cohort.step", step as i64),
            ],
        })
    }

    /// Sends what waits; blocks the thread for two seconds at most. What comes later is dropped.
    pub fn finish(&self) {
        if let Some(way) = &self.0 {
            // A collector that does not answer has been logged.
            let _ = way.processor.shutdown_with_timeout(FAREWELL);
        }
    }
}

/// The trace of one step.
#[derive(Clone, Debug)]
pub struct StepTrace {
    way: Arc<Way>,
    trace: TraceId,
    root: SpanId,
    attributes: Vec<KeyValue>,
}

impl StepTrace {
    /// The span of the whole step.
    pub fn root(&self, start: SystemTime, end: SystemTime, attributes: Vec<Attribute>) {
        self.span(
            "step".into(),
            (self.root, SpanId::INVALID),
            (start, end),
            attributes,
        );
    }

    /// A span within the step.
    pub fn child(
        &self,
        name: impl Into<std::borrow::Cow<'static, str>>,
        start: SystemTime,
        end: SystemTime,
        attributes: Vec<Attribute>,
    ) {
        let number = self.way.spans.fetch_add(1, Ordering::Relaxed);
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.way.service.as_bytes());
        hasher.update(&self.trace.to_bytes());
        hasher.update(&self.way.process.to_le_bytes());
        hasher.update(&number.to_le_bytes());
        let id = SpanId::from_bytes(first(hasher.finalize().as_bytes()));
        self.span(name.into(), (id, self.root), (start, end), attributes);
    }

    fn span(
        &self,
        name: std::borrow::Cow<'static, str>,
        (id, parent): (SpanId, SpanId),
        (start_time, end_time): (SystemTime, SystemTime),
        more: Vec<Attribute>,
    ) {
        let mut attributes = self.attributes.clone();
        attributes.extend(more);
        let context = SpanContext::new(
            self.trace,
            id,
            TraceFlags::SAMPLED,
            false,
            opentelemetry::trace::TraceState::NONE,
        );
        self.way.processor.on_end(SpanData {
            span_context: context,
            parent_span_id: parent,
            // The root is the coordinator's.
            parent_span_is_remote: parent != SpanId::INVALID && self.way.service != COORDINATOR,
            span_kind: SpanKind::Internal,
            name,
            start_time,
            // A clock that was set back must not make a span of negative length.
            end_time: end_time.max(start_time),
            attributes,
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: self.way.scope.clone(),
        });
    }
}

/// The name under which the coordinator's spans appear.
pub const COORDINATOR: &str = "cohort-coordinator";
/// The name under which workers' spans appear.
pub const WORKER: &str = "cohort-worker";

/// The ids of a step's trace and of its root span.
fn ids(run: &RunId, step: Step) -> (TraceId, SpanId) {
    let mut hasher = blake3::Hasher::new_derive_key("cohort trace of a step");
    hasher.update(run.as_str().as_bytes());
    hasher.update(&step.to_le_bytes());
    let hash = hasher.finalize();
    let (trace, rest) = hash.as_bytes().split_at(16);
    (
        TraceId::from_bytes(first(trace)),
        SpanId::from_bytes(first(rest)),
    )
}

/// The first bytes of a hash; as ids may not be zero, the last of them never is.
fn first<const N: usize>(hash: &[u8]) -> [u8; N] {
    let mut bytes: [u8; N] = hash[..N].try_into().expect("a hash is longer");
    bytes[N - 1] |= 1;
    bytes
}

/// Sends spans, and says once that it cannot.
#[derive(Debug)]
struct Patient {
    exporter: opentelemetry_otlp::SpanExporter,
    url: String,
    failed: AtomicBool,
}

impl SpanExporter for Patient {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let sent = self.exporter.export(batch).await;
        match &sent {
            Ok(()) => self.failed.store(false, Ordering::Relaxed),
            Err(error) if !self.failed.swap(true, Ordering::Relaxed) => {
                let url = &self.url;
                warn!(url, %error, "the collector does not take traces; the run goes on without");
            }
            Err(_) => {}
        }
        sent
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> RunId {
        RunId::new("tiny-1")
    }

    #[test]
    fn ids_depend_on_run_and_step_and_on_nothing_else() {
        assert_eq!(ids(&run(), 10), ids(&run(), 10));
        assert_ne!(ids(&run(), 10), ids(&run(), 20));
        assert_ne!(ids(&run(), 10), ids(&RunId::new("tiny-2"), 10));
        assert_ne!(first::<8>(&[0; 32]), [0; 8]);
    }

    #[test]
    fn nothing_is_traced_unless_somebody_asks() {
        assert!(Traces::default().step(&run(), 10).is_none());
        Traces::default().finish();
    }

    #[tokio::test]
    async fn a_step_out_of_every_few_is_traced_and_an_absent_collector_harms_nobody() {
        let traces = Traces::to("http://127.0.0.1:9", 5, WORKER, 1).expect("an address");
        assert!(traces.step(&run(), 3).is_none());
        let step = traces.step(&run(), 5).expect("it is traced");
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(9);
        step.child("lane 0", now, now, Vec::new());
        tokio::task::spawn_blocking(move || traces.finish())
            .await
            .expect("it ends");
        step.child("lane 1", now, now, Vec::new());
    }

    #[test]
    fn an_address_must_be_one() {
        for url in ["", "127.0.0.1:4317", "https://host:4317", "http://"] {
            let error = Traces::to(url, 1, WORKER, 1).expect_err(url).to_string();
            assert!(error.contains("http://127.0.0.1:4317"), "{error}");
        }
    }
}
