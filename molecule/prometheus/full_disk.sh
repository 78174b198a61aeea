# Alertmanager is away while alerts begin to fire, the edge's among them; then Prometheus' disk is full. They are kept, and delivered
# with their runbooks.
set -e
data=/var/lib/prometheus/metrics2
until_true() {
    timeout "$1" sh -c "until $2; do sleep 0.2; done" || { echo "not within $1 s: $2"; exit 1; }
}
systemctl stop prometheus.service
mount -t tmpfs -o size=24M tmpfs $data
chown prometheus: $data
systemctl start prometheus.service
query="promtool query instant --http.config.file=/etc/prometheus/client.yml https://127.0.0.1:9090"
systemctl stop prometheus-alertmanager.service
echo 'llmkeep_certificate_expiry_seconds{path="soon"} 1' > /var/lib/llmkeep-readings/soon.prom
until_true 60 "$query 'ALERTS{alertname=\"CertificateEnds\", alertstate=\"firing\"}' 2>&1 | grep --quiet soon"
until_true 60 "$query 'ALERTS{alertname=\"EdgeSpeaksOldTls\", alertstate=\"firing\"}' 2>&1 | grep --quiet firing"
until_true 60 "$query 'prometheus_notifications_errors_total > 0' 2>&1 | grep --quiet errors"
if dd if=/dev/zero of=$data/filler bs=64K status=none 2>/dev/null; then echo "$data did not fill"; exit 1; fi
systemctl start prometheus-alertmanager.service
for receiver in webhook mail; do
    until_true 120 "grep --quiet 'docs/operate/metrics.md#certificate' /run/alerts/$receiver"
done
until_true 120 "grep --quiet 'docs/operate/metrics.md#edge' /run/alerts/webhook"
until_true 60 "$query 'time() - max(timestamp(up)) > 7' 2>&1 | grep --quiet @"
