{{- define "konsil.labels" -}}
app.kubernetes.io/name: konsil-coordinator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "konsil.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}
