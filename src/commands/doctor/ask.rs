//! Asks a coordinator what there is to know of it and of the way to it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use cohort_common::api::Whoami;
use cohort_common::net::{self, Credentials, Token};
use cohort_common::security::{Credential, Trust, Whom};
use cohort_common::wire::{self, MAX_MESSAGE, MAX_PIECE};
use cohort_proto::v1;
use cohort_proto::v1::client_client::ClientClient;
use cohort_proto::v1::data_client::DataClient;
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::probe::identity;
use super::reach::{Answer, Reach};
use crate::context::Context;
use crate::output::now_ms;

/// Round trips that are measured.
const ROUNDS: usize = 21;
/// Bytes that are sent there and back.
const SENT: usize = 16 << 20;
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is known of the coordinator at `url`, as whoever the arguments and the home directory make of the caller.
pub async fn coordinator(context: &Context, url: &str) -> Result<Reach> {
    let credentials = credentials(context, url)?;
    let asked = tokio::time::timeout(4 * PATIENCE, ask(url, credentials)).await;
    Ok(Reach {
        url: url.into(),
        answer: asked.unwrap_or_else(|_| Err(format!("{url} does not answer in time"))),
    })
}

/// The token that is given, or that the home has; else the certificate of the home's worker.
fn credentials(context: &Context, url: &str) -> Result<Credentials> {
    let token = context.token_for(url)?;
    let trust = match token.as_ref().and_then(Token::trust) {
        None if url.starts_with("https://") => certified(&context.home),
        trust => trust,
    };
    Ok(Credentials {
        token,
        trust,
        ..Credentials::default()
    })
}

fn certified(home: &Path) -> Option<Trust> {
    // One that is damaged is a finding of the home.
    let credential = Credential::open(&identity(home)?).ok()?;
    Some(Trust::with(Arc::new(credential)))
}

async fn ask(url: &str, credentials: Credentials) -> Result<Answer, String> {
    let connect = || net::connect(url, credentials.trust.as_ref(), Whom::Coordinator);
    let channel = connect().await.map_err(|error| error.to_string())?;
    let mut client = ClientClient::with_interceptor(channel.clone(), credentials.clone());
    let whoami = client.whoami(v1::Empty {}).await;
    let now_ms = now_ms();
    let whoami = whoami
        .map_err(|status| sentence(&status))
        .and_then(|reply| {
            wire::from_json::<Whoami>(reply.get_ref()).map_err(|error| error.to_string())
        });
    let (serving, round_trip) = health(channel).await.map_err(|status| sentence(&status))?;
    let echo = match connect().await {
        Ok(channel) => echo(channel, &credentials).await,
        Err(error) => Err(error.to_string()),
    };
    Ok(Answer {
        serving,
        round_trip,
        whoami,
        now_ms,
        echo,
    })
}

/// Whether it can do its work, and how long an answer takes: the middle one, and the longest.
async fn health(channel: Channel) -> Result<(Option<bool>, (Duration, Duration)), Status> {
    let mut client = HealthClient::new(channel);
    let mut times = Vec::with_capacity(ROUNDS);
    let mut serving = None;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        match client.check(HealthCheckRequest::default()).await {
            Ok(reply) => serving = Some(reply.get_ref().status() == ServingStatus::Serving),
            // That answer takes as long.
            Err(status) if status.code() == Code::Unimplemented => {}
            Err(status) => return Err(status),
        }
        times.push(started.elapsed());
    }
    times.sort();
    Ok((serving, (times[ROUNDS / 2], times[ROUNDS - 1])))
}

/// Bytes a second in each direction, while both are busy. What did not come back in time is not waited for: the way is as
/// narrow as that.
async fn echo(channel: Channel, credentials: &Credentials) -> Result<f64, String> {
    let mut client = DataClient::with_interceptor(channel, credentials.clone())
        .max_decoding_message_size(MAX_MESSAGE);
    let data: Vec<u8> = (0..MAX_PIECE)
        .map(|i| ((i * 2_654_435_761) >> 7) as u8)
        .collect();
    let piece = v1::Piece { data: data.into() };
    let pieces = tokio_stream::iter(vec![piece; SENT / MAX_PIECE]);
    let started = Instant::now();
    let mut bytes = 0;
    let come_back = async {
        let mut answer = client.echo(pieces).await?.into_inner();
        while let Some(piece) = answer.next().await {
            bytes += piece?.data.len();
        }
        Ok(())
    };
    let over = match tokio::time::timeout(PATIENCE, come_back).await {
        Err(_) => false,
        Ok(Err(status)) => return Err(sentence(&status)),
        Ok(Ok(())) => true,
    };
    speed(bytes, started.elapsed(), over)
}

/// What that many bytes in that time are a second; `over` says that no more would have come.
fn speed(bytes: usize, time: Duration, over: bool) -> Result<f64, String> {
    match over && bytes < SENT {
        true => Err(format!("{bytes} of {SENT} bytes came back")),
        false => Ok(bytes as f64 / time.as_secs_f64().max(1e-9)),
    }
}

fn sentence(status: &Status) -> String {
    match (status.code(), status.message()) {
        (Code::Unimplemented, _) => "the coordinator is older than this call".into(),
        (code, "") => code.description().into(),
        (_, message) => message.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_back_in_time_says_how_wide_the_way_is() {
        assert_eq!(speed(SENT, Duration::from_secs(2), true), Ok(8_388_608.0));
        // A narrow way is no reason to say nothing of it.
        assert_eq!(speed(5_000_000, PATIENCE, false), Ok(500_000.0));
        assert_eq!(speed(0, PATIENCE, false), Ok(0.0));
        let short = speed(1, PATIENCE, true).unwrap_err();
        assert_eq!(short, "1 of 16777216 bytes came back");
    }
}
