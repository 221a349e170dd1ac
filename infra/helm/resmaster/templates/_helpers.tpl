{{- define "resmaster.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "resmaster.claim" -}}
{{ .Values.models.claim | default (printf "%s-models" .Release.Name) }}
{{- end }}

{{/* What all pods have in common, of the profile `restricted`. */}}
{{- define "resmaster.pod" -}}
serviceAccountName: {{ .Release.Name }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "resmaster.container" -}}
image: {{ .Values.image.name | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
{{- end }}

{{/* A worker of the pool: (chart, further arguments). */}}
{{- define "resmaster.worker" -}}
{{- $ := index . 0 -}}
name: worker
{{ include "resmaster.container" $ }}
args: [prefect, worker, start, --pool, resmaster-process, --name, $(POD_NAME), --with-healthcheck, {{ join ", " (index . 1) }}]
env:
  - {name: PREFECT_API_URL, value: {{ required "set server.url to the URL of the Prefect server's API" $.Values.server.url | quote }}}
  - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
envFrom: [{secretRef: {name: {{ $.Values.secrets.prefect }}}}, {secretRef: {name: {{ $.Values.secrets.store }}}}]
ports: [{name: health, containerPort: 8080}]
livenessProbe:
  httpGet: {path: /health, port: health}
  initialDelaySeconds: 30
  periodSeconds: 30
volumeMounts:
  - {name: scratch, mountPath: /tmp}
  - {name: shm, mountPath: /dev/shm}
  - {name: models, mountPath: /models}
{{- end }}

{{- define "resmaster.volumes" -}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: 1Gi}}
- {name: models, persistentVolumeClaim: {claimName: {{ include "resmaster.claim" . }}}}
{{- end }}
