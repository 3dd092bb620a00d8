// Shows how many workers the coordinator has.
const answer = await fetch("/api/cluster");
if (answer.ok) {
  const cluster = await answer.json();
  document.getElementById("cluster").textContent =
    `Version ${cluster.version}, workers: ${cluster.workers.length}`;
}
