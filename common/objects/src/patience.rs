//! Asking again.

use std::time::Duration;

use tokio::time::sleep;

/// Asks so many times, with a pause before the second one that doubles from then on, while the answer is an error that may
/// pass.
pub async fn patiently<T, E, F>(
    (tries, mut pause): (u32, Duration),
    passes: impl Fn(&E) -> bool,
    mut ask: impl FnMut() -> F,
) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    for _ in 1..tries {
        match ask().await {
            Err(error) if passes(&error) => {
                sleep(pause).await;
                pause *= 2;
            }
            answer => return answer,
        }
    }
    ask().await
}
